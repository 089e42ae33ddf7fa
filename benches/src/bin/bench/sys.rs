//! System calls without a safe wrapper.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

/// A file in the address space, for reading.
#[derive(Debug)]
pub(crate) struct MappedFile {
    address: NonNull<libc::c_void>,
    length: usize,
}

impl MappedFile {
    /// Maps `length` bytes of a file, at least one, from `offset` on, which is a multiple of the
    /// page size. Reads none of them.
    ///
    /// # Errors
    ///
    /// The file cannot be mapped.
    pub(crate) fn new(file: &File, offset: u64, length: usize) -> Result<Self> {
        let start = offset.try_into().map_err(Error::other)?;
        let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED);
        // SAFETY: the kernel chooses a place where nothing is mapped.
        let address = unsafe {
            libc::mmap(ptr::null_mut(), length, protection, flags, file.as_raw_fd(), start)
        };
        if address == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let address = NonNull::new(address).ok_or_else(|| Error::other("mapped at address 0"))?;
        let mapped = Self { address, length };
        // SAFETY: the range is the mapping. Touching a page then reads no others.
        if unsafe { libc::madvise(address.as_ptr(), length, libc::MADV_RANDOM) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(mapped)
    }

    /// Returns for each page of `page_size` bytes whether it is in the page cache.
    ///
    /// # Errors
    ///
    /// The system does not report it.
    pub(crate) fn cached_pages(&self, page_size: usize) -> Result<Vec<bool>> {
        let mut pages = vec![0_u8; self.length.div_ceil(page_size)];
        // SAFETY: the range is the mapping, and there is a byte for each of its pages.
        let result =
            unsafe { libc::mincore(self.address.as_ptr(), self.length, pages.as_mut_ptr()) };
        if result != 0 {
            return Err(Error::last_os_error());
        }
        Ok(pages.into_iter().map(|page| page & 1 != 0).collect())
    }

    /// Makes the page table refer to the page with the byte at `offset` of the mapping, which is in
    /// the page cache, and returns the byte's address.
    pub(crate) fn touch(&self, offset: usize) -> usize {
        assert!(offset < self.length, "{offset} is not mapped");
        // SAFETY: the byte is within the mapping. The files belong to this program, which does not
        // shorten them while they are mapped.
        unsafe {
            let byte = self.address.as_ptr().cast::<u8>().add(offset);
            ptr::read_volatile(byte);
            byte as usize
        }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping, and no reference to it exists. A failure changes
        // nothing.
        let _ = unsafe { libc::munmap(self.address.as_ptr(), self.length) };
    }
}
