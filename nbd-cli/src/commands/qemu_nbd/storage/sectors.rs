//! Sizes in whole sectors, as for all of QEMU's block devices.

use std::io;
use std::sync::Arc;

use imgfmt::storage::StorageExtent;
use imgfmt::{Capabilities, Durability, ExtentKind, HostOffset, Speed, Storage, TryRead, ZeroMode};

/// In bytes.
pub(in crate::commands::qemu_nbd) const SECTOR: u64 = 512;

/// Returns the storage itself if its size is a multiple of a sector, or else a longer one: it reads
/// as zero after the end of the other, and a write there extends the other.
pub(in crate::commands::qemu_nbd) fn in_whole_sectors(
    inner: Arc<dyn Storage>,
) -> io::Result<Arc<dyn Storage>> {
    let length = inner.len()?;
    if length.is_multiple_of(SECTOR) {
        return Ok(inner);
    }
    let padded = length.checked_next_multiple_of(SECTOR).ok_or(io::ErrorKind::FileTooLarge)?;
    Ok(Arc::new(Sectors { inner, padded }))
}

#[derive(Debug)]
struct Sectors {
    inner: Arc<dyn Storage>,
    /// The least length.
    padded: u64,
}

impl Sectors {
    /// Returns the part of a range that lies within the other storage.
    fn available(&self, offset: HostOffset, length: u64) -> io::Result<u64> {
        Ok(self.inner.len()?.saturating_sub(offset.bytes()).min(length))
    }
}

impl Storage for Sectors {
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

    fn readahead(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        match self.available(offset, length)? {
            0 => Ok(()),
            length => self.inner.readahead(offset, length),
        }
    }
}

#[cfg(test)]
mod tests {
    use imgfmt::storage::MemoryStorage;

    use super::*;

    fn at(offset: u64) -> HostOffset {
        HostOffset::new(offset)
    }

    #[test]
    fn the_rest_of_the_last_sector_reads_as_zero_and_can_be_written() {
        let inner = Arc::new(MemoryStorage::new(1000));
        inner.write_at(at(0), &[7; 1000], Durability::Cached).unwrap();
        let sectors = in_whole_sectors(inner.clone()).unwrap();
        assert_eq!(sectors.len().unwrap(), 1024);
        let mut end = [9; 30];
        assert_eq!(sectors.read_at(at(996), &mut end).unwrap(), 28);
        assert_eq!(end[..28], [&[7; 4][..], &[0; 24]].concat());
        let hole = StorageExtent { length: 24, kind: ExtentKind::Hole };
        assert_eq!(sectors.next_extent(at(1000), 24).unwrap(), hole);
        assert_eq!(sectors.next_extent(at(0), 1024).unwrap().length, 1000);
        sectors.write_zeroes(at(990), 34, ZeroMode::MayUnmap, Speed::Any).unwrap();
        sectors.punch_hole(at(1000), 24).unwrap();
        assert_eq!(inner.len().unwrap(), 1000, "zeroes do not make it longer");
        sectors.write_at(at(1010), &[5; 10], Durability::Cached).unwrap();
        assert_eq!((inner.len().unwrap(), sectors.len().unwrap()), (1020, 1024));
        let mut last = [9; 40];
        sectors.read_exact_at(at(984), &mut last).unwrap();
        let expected = [&[7; 6][..], &[0; 20], &[5; 10], &[0; 4]].concat();
        assert_eq!(last[..], expected);
    }

    #[test]
    fn whole_sectors_are_left_alone() {
        let inner: Arc<dyn Storage> = Arc::new(MemoryStorage::new(1024));
        let same = in_whole_sectors(Arc::clone(&inner)).unwrap();
        assert!(Arc::ptr_eq(&inner, &same));
    }
}
