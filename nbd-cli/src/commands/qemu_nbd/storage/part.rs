//! The driver `raw` with `offset` and `size`: a part of a file, such as a disk in a tar archive.

use std::io;
use std::sync::Arc;

use imgfmt::storage::StorageExtent;
use imgfmt::{Capabilities, Durability, HostOffset, Speed, Storage, TryRead, ZeroMode};

use nbd_server::export::filters::Window;

/// A part of another storage. With a size it never accesses bytes after the part; without one it
/// grows with the other storage.
#[derive(Debug)]
pub(in crate::commands::qemu_nbd) struct Part {
    inner: Arc<dyn Storage>,
    offset: u64,
    size: Option<u64>,
}

impl Part {
    /// # Errors
    ///
    /// A sentence if the part does not lie within `inner`.
    pub(in crate::commands::qemu_nbd) fn new(
        inner: Arc<dyn Storage>,
        window: Window,
    ) -> Result<Self, String> {
        let whole = inner.len().map_err(|error| error.to_string())?;
        window.check(whole).map_err(|error| error.to_string())?;
        Ok(Self { inner, offset: window.offset, size: window.size })
    }

    /// Returns the start in the other storage of a range inside the part.
    fn inside(&self, offset: HostOffset, length: u64) -> io::Result<HostOffset> {
        let outside = self
            .size
            .is_some_and(|size| offset.bytes().checked_add(length).is_none_or(|end| end > size));
        match self.offset.checked_add(offset.bytes()) {
            Some(position) if !outside => Ok(HostOffset::new(position)),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }
}

impl Storage for Part {
    fn len(&self) -> io::Result<u64> {
        match self.size {
            Some(size) => Ok(size),
            None => Ok(self.inner.len()?.saturating_sub(self.offset)),
        }
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.len()?.saturating_sub(offset.bytes());
        let length = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
        self.inner.read_at(self.inside(offset, length as u64)?, &mut buffer[..length])
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        match self.inside(offset, buffer.len() as u64) {
            Ok(position) => self.inner.try_read_at(position, buffer),
            // The blocking read determines the size.
            Err(_) => Ok(TryRead::WouldBlock),
        }
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        self.inner.write_at(self.inside(offset, data.len() as u64)?, data, durability)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        match self.size {
            Some(size) if size == length => Ok(()),
            Some(_) => Err(io::ErrorKind::Unsupported.into()),
            None => {
                let whole = self.offset.checked_add(length).ok_or(io::ErrorKind::StorageFull)?;
                self.inner.set_len(whole)
            }
        }
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.punch_hole(self.inside(offset, length)?, length)
    }

    fn write_zeroes(
        &self,
        offset: HostOffset,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
    ) -> io::Result<()> {
        self.inner.write_zeroes(self.inside(offset, length)?, length, mode, speed)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        self.inner.next_extent(self.inside(offset, length)?, length)
    }

    fn readahead(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.readahead(self.inside(offset, length)?, length)
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
    fn a_part_with_a_size_never_touches_what_is_behind_it() {
        let whole = Arc::new(MemoryStorage::new(4096));
        whole.write_at(at(0), &[7; 4096], Durability::Cached).unwrap();
        let window = Window { offset: 512, size: Some(1024) };
        let part = Part::new(whole.clone(), window).unwrap();
        assert_eq!(part.len().unwrap(), 1024);
        part.write_at(at(0), &[1; 1024], Durability::Cached).unwrap();
        let zeroed = part.write_zeroes(at(1000), 100, ZeroMode::KeepAllocated, Speed::Any);
        let refused = [
            part.write_at(at(1023), &[2; 2], Durability::Cached),
            part.write_at(at(u64::MAX), &[2], Durability::Cached),
            zeroed,
            part.punch_hole(at(0), 1025),
            part.set_len(2048),
        ];
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
        let mut all = [0; 4096];
        whole.read_exact_at(at(0), &mut all).unwrap();
        assert!(all[..512].iter().chain(&all[1536..]).all(|byte| *byte == 7));
        assert!(all[512..1536].iter().all(|byte| *byte == 1));
        let mut end = [9; 100];
        assert_eq!(part.read_at(at(1000), &mut end).unwrap(), 24);
        assert_eq!(part.try_read_at(at(1000), &mut end).unwrap(), TryRead::WouldBlock);
    }

    #[test]
    fn a_part_without_a_size_ends_where_the_whole_does() {
        let whole = Arc::new(MemoryStorage::new(4096));
        let part = Part::new(whole.clone(), Window { offset: 512, size: None }).unwrap();
        assert_eq!(part.len().unwrap(), 3584);
        part.set_len(7680).unwrap();
        assert_eq!(whole.len().unwrap(), 8192);
        for window in [
            Window { offset: 9000, size: None },
            Window { offset: 8000, size: Some(512) },
            Window { offset: u64::MAX, size: Some(u64::MAX) },
        ] {
            assert!(Part::new(whole.clone(), window).is_err(), "{window:?}");
        }
    }
}
