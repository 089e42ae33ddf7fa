//! The `unsafe` code: open-file-description locks, errors of writeback, and the words of a
//! memory-mapped file.
//!
//! Nothing else in this crate is unsafe. `rustix` has no call for `F_OFD_SETLK`, `F_OFD_GETLK` and
//! `sync_file_range`.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::AtomicU64;

use memmap2::MmapRaw;

/// The complete words of a mapped file.
pub(crate) fn mapped_words(map: &MmapRaw) -> &[AtomicU64] {
    let count = map.len() / size_of::<AtomicU64>();
    let first = map.as_mut_ptr().cast::<AtomicU64>().cast_const();
    // SAFETY: a mapping starts at a page and so is aligned for words. An `MmapRaw` is readable and
    // writable, `count` words long, initialised by the kernel, and outlives the slice, which
    // borrows it. An atomic may be changed through a shared reference, and every access is atomic,
    // also in other processes that map the file.
    unsafe { std::slice::from_raw_parts(first, count) }
}

/// Takes a shared lock on one byte for the open file description of `fd`, without waiting.
///
/// # Errors
///
/// `EAGAIN` or `EACCES` if another open file description holds an exclusive lock on the byte,
/// `ENOLCK` or `EINVAL` if the file system has no such locks.
pub(crate) fn lock_byte_shared(fd: BorrowedFd<'_>, byte: u64) -> io::Result<()> {
    let mut lock = byte_lock(libc::F_RDLCK, byte)?;
    fcntl_lock(fd, libc::F_OFD_SETLK, &mut lock)
}

/// Releases all locks of the open file description of `fd`.
pub(crate) fn unlock(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut lock = byte_lock(libc::F_UNLCK, 0)?;
    lock.l_len = 0; // to the end, wherever that is
    fcntl_lock(fd, libc::F_OFD_SETLK, &mut lock)
}

/// Whether another open file description holds any lock on this byte.
pub(crate) fn byte_is_locked(fd: BorrowedFd<'_>, byte: u64) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte)?;
    fcntl_lock(fd, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Fails if data of the file could not be written back since `fd` was opened, or since this or
/// `fsync` last told. Waits for nothing.
///
/// # Errors
///
/// That of the writeback.
pub(crate) fn check_writeback(fd: BorrowedFd<'_>) -> io::Result<()> {
    // The last byte that a file can have: there is nothing to wait for.
    let (last, length) = (libc::off64_t::MAX - 1, 1);
    // SAFETY: the descriptor is open while it is borrowed, and no memory is passed.
    let result = unsafe {
        libc::sync_file_range(fd.as_raw_fd(), last, length, libc::SYNC_FILE_RANGE_WAIT_BEFORE)
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // There is no such call here, or not for this file.
        Some(libc::ENOSYS | libc::EPERM | libc::EINVAL | libc::ESPIPE) => Ok(()),
        _ => Err(error),
    }
}

fn byte_lock(kind: libc::c_int, byte: u64) -> io::Result<libc::flock> {
    let start =
        libc::off_t::try_from(byte).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: `flock` is a plain C structure of integers, for which all zeroes is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = 1;
    // `l_pid` must be 0 for open-file-description locks; `zeroed` made it so.
    Ok(lock)
}

fn fcntl_lock(fd: BorrowedFd<'_>, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed, and `lock` points to a whole `flock`
    // that the kernel reads and, for F_OFD_GETLK, writes before the call returns.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_lock_is_seen_by_another_description_and_not_by_its_own() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let one = file.reopen().unwrap();
        let two = file.reopen().unwrap();
        lock_byte_shared(one.as_fd(), 100).unwrap();
        assert!(!byte_is_locked(one.as_fd(), 100).unwrap());
        assert!(byte_is_locked(two.as_fd(), 100).unwrap());
        assert!(!byte_is_locked(two.as_fd(), 101).unwrap());
        lock_byte_shared(two.as_fd(), 100).unwrap();
        drop(one);
        drop(two);
        assert!(!byte_is_locked(file.as_file().as_fd(), 100).unwrap());
    }

    #[test]
    fn a_file_that_is_being_written_back_has_no_error_of_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        check_writeback(file.as_file().as_fd()).unwrap();
        std::fs::write(file.path(), [1; 4096]).unwrap();
        check_writeback(file.as_file().as_fd()).unwrap();
        // Other files have no writeback, and so no error of it.
        let (pipe, _) = io::pipe().unwrap();
        check_writeback(pipe.as_fd()).unwrap();
    }

    #[test]
    fn unlocking_gives_all_locks_back_although_the_description_lives_on() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let one = file.reopen().unwrap();
        for byte in [100, 203] {
            lock_byte_shared(one.as_fd(), byte).unwrap();
        }
        let _duplicate = one.try_clone().unwrap();
        unlock(one.as_fd()).unwrap();
        for byte in [100, 203] {
            assert!(!byte_is_locked(file.as_file().as_fd(), byte).unwrap());
        }
    }
}
