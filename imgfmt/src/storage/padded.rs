//! A storage whose size is a multiple of a block, as for all of QEMU's block devices.

use std::io;
use std::sync::Arc;

use super::{
    Capabilities, DirectAlignment, Durability, Speed, Storage, StorageExtent, TryRead, ZeroMode,
};
use crate::extent::ExtentKind;
use crate::units::HostOffset;

/// Returns the storage itself if its size is a multiple of `block` bytes, or else a longer one: it
/// reads as zero after the end of the other, and a write there extends the other.
///
/// # Errors
///
/// If the size is unknown or too large, or `block` is 0.
pub fn in_whole_blocks(inner: Arc<dyn Storage>, block: u64) -> io::Result<Arc<dyn Storage>> {
    let length = inner.len()?;
    if length.is_multiple_of(block) {
        return Ok(inner);
    }
    let padded = match block {
        0 => return Err(io::ErrorKind::InvalidInput.into()),
        block => length.checked_next_multiple_of(block).ok_or(io::ErrorKind::FileTooLarge)?,
    };
    Ok(Arc::new(PaddedStorage { inner, padded }))
}

#[derive(Debug)]
struct PaddedStorage {
    inner: Arc<dyn Storage>,
    /// The minimum length, in bytes.
    padded: u64,
}

impl PaddedStorage {
    /// Returns the length of the part of a range that is within the other storage.
    fn available(&self, offset: HostOffset, length: u64) -> io::Result<u64> {
        Ok(self.inner.len()?.saturating_sub(offset.bytes()).min(length))
    }
}

impl Storage for PaddedStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.len()?.max(self.padded))
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.len()?.saturating_sub(offset.bytes());
        let length = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.inner.read_at(offset, &mut buffer[..length])?;
        buffer[read..length].fill(0);
        Ok(length)
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        // At the end of the other storage the read is incomplete, and is reported as such.
        self.inner.try_read_at(offset, buffer)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        self.inner.write_at(offset, data, durability)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.inner.set_len(length)
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        match self.available(offset, length)? {
            0 => Ok(()),
            length => self.inner.punch_hole(offset, length),
        }
    }

    fn write_zeroes(
        &self,
        offset: HostOffset,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
    ) -> io::Result<()> {
        match self.available(offset, length)? {
            0 => Ok(()),
            length => self.inner.write_zeroes(offset, length, mode, speed),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        match self.available(offset, length)? {
            0 => Ok(StorageExtent { length, kind: ExtentKind::Hole }),
            length => self.inner.next_extent(offset, length),
        }
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        let is_within = self.available(offset, length).is_ok_and(|within| within == length);
        is_within && self.inner.is_known_data(offset, length)
    }

    fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.inner.direct_alignment()
    }

    fn readahead(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        match self.available(offset, length)? {
            0 => Ok(()),
            length => self.inner.readahead(offset, length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryStorage;
    use super::*;

    fn at(offset: u64) -> HostOffset {
        HostOffset::new(offset)
    }

    #[test]
    fn the_rest_of_the_last_block_reads_as_zero_and_can_be_written() {
        let inner = Arc::new(MemoryStorage::new(1000));
        inner.write_at(at(0), &[7; 1000], Durability::Cached).unwrap();
        let padded = in_whole_blocks(inner.clone(), 512).unwrap();
        assert_eq!(padded.len().unwrap(), 1024);
        let mut end = [9; 30];
        assert_eq!(padded.read_at(at(996), &mut end).unwrap(), 28);
        assert_eq!(end[..28], [&[7; 4][..], &[0; 24]].concat());
        let hole = StorageExtent { length: 24, kind: ExtentKind::Hole };
        assert_eq!(padded.next_extent(at(1000), 24).unwrap(), hole);
        assert_eq!(padded.next_extent(at(0), 1024).unwrap().length, 1000);
        padded.write_zeroes(at(990), 34, ZeroMode::MayUnmap, Speed::Any).unwrap();
        padded.punch_hole(at(1000), 24).unwrap();
        assert_eq!(inner.len().unwrap(), 1000, "zeroes do not make it longer");
        padded.write_at(at(1010), &[5; 10], Durability::Cached).unwrap();
        assert_eq!((inner.len().unwrap(), padded.len().unwrap()), (1020, 1024));
        let mut last = [9; 40];
        padded.read_exact_at(at(984), &mut last).unwrap();
        let expected = [&[7; 6][..], &[0; 20], &[5; 10], &[0; 4]].concat();
        assert_eq!(last[..], expected);
    }

    #[test]
    fn whole_blocks_are_left_alone() {
        let inner: Arc<dyn Storage> = Arc::new(MemoryStorage::new(1024));
        let same = in_whole_blocks(Arc::clone(&inner), 512).unwrap();
        assert!(Arc::ptr_eq(&inner, &same));
    }
}
