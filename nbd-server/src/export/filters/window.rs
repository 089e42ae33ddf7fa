//! [`Window`]: a part of a disk as a separate disk.

use std::sync::Arc;

use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextName};

use crate::export::{
    Durability, Export, ExportError, ExportInfo, Filter, Holes, Lookup, Mapped, PlacedRead,
    PlacedWrite, ReadMap, Speed, TryRead, TryWrite, ZeroMode,
};

/// The reason why a part of a disk cannot be served. All sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// It begins after the end of the disk.
    #[error("Offset {offset} is past the end of the image ({whole} bytes)")]
    OffsetTooLarge {
        /// Where the part begins.
        offset: u64,
        /// Size of the disk.
        whole: u64,
    },
    /// It ends after the end of the disk.
    #[error("Offset {offset} and size {size} reach past the end of the image ({whole} bytes)")]
    SizeTooLarge {
        /// Where the part begins.
        offset: u64,
        /// Its size.
        size: u64,
        /// Size of the disk.
        whole: u64,
    },
    /// The offset of a part within a part exceeds 64 bits.
    #[error("Offset {offset} is out of range")]
    OffsetOverflow {
        /// The offset.
        offset: u64,
    },
    /// It begins within a block of the disk.
    #[error("Offset {offset} is not a multiple of the minimum block size of the disk ({minimum})")]
    Misaligned {
        /// Where the part begins.
        offset: u64,
        /// The [minimum block size](nbd_proto::wire::BlockSizes::minimum) of the disk.
        minimum: u32,
    },
}

/// The part of a disk that is served, in bytes. The default is all of it.
///
/// This plain value has these two fields and will have no others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Window {
    /// Where the part begins.
    pub offset: u64,
    /// Its size; `None`: to the end of the disk.
    pub size: Option<u64>,
}

impl Window {
    /// Checks that the part is within a disk of `whole` bytes.
    ///
    /// # Errors
    ///
    /// [`WindowError`] if it is not.
    pub fn check(self, whole: u64) -> Result<(), WindowError> {
        let offset = self.offset;
        let rest = whole.checked_sub(offset);
        let rest = rest.ok_or(WindowError::OffsetTooLarge { offset, whole })?;
        match self.size {
            Some(size) if size > rest => Err(WindowError::SizeTooLarge { offset, size, whole }),
            _ => Ok(()),
        }
    }

    /// Returns this part of the part `outer` of a disk, as a part of that disk.
    ///
    /// ```
    /// # use nbd_server::export::filters::Window;
    /// let partition = Window { offset: 1 << 20, size: Some(1 << 30) };
    /// let end = Window { offset: 1 << 29, size: None };
    /// let expected = Window { offset: (1 << 20) + (1 << 29), size: Some(1 << 29) };
    /// assert_eq!(end.within(partition)?, expected);
    /// # Ok::<(), nbd_server::export::filters::WindowError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`WindowError`] if this part is not within `outer`.
    pub fn within(self, outer: Self) -> Result<Self, WindowError> {
        let size = match outer.size {
            None => self.size,
            Some(whole) => {
                self.check(whole)?;
                Some(self.size.unwrap_or(whole.saturating_sub(self.offset)))
            }
        };
        let offset = outer.offset.checked_add(self.offset);
        let offset = offset.ok_or(WindowError::OffsetOverflow { offset: self.offset })?;
        Ok(Self { offset, size })
    }

    /// Returns the part of `inner`; `inner` itself for all of it.
    ///
    /// # Errors
    ///
    /// [`WindowError`] if the part is not within the disk, or begins within a block of its minimum
    /// block size.
    pub fn apply(self, inner: Arc<dyn Export>) -> Result<Arc<dyn Export>, WindowError> {
        if self == Self::default() {
            return Ok(inner);
        }
        let (offset, info) = (self.offset, inner.info());
        let (whole, minimum) = (info.size, info.block_sizes.minimum());
        self.check(whole)?;
        if !offset.is_multiple_of(u64::from(minimum)) {
            return Err(WindowError::Misaligned { offset, minimum });
        }
        let size = self.size.unwrap_or(whole.saturating_sub(offset));
        Ok(Arc::new(WindowExport { inner, offset, size }))
    }
}

/// The server keeps requests within the size, so that no sum here leaves the inner disk.
struct WindowExport {
    inner: Arc<dyn Export>,
    offset: u64,
    size: u64,
}

impl WindowExport {
    fn inside(&self, offset: u64) -> Result<u64, ExportError> {
        let outside = || ExportError::new(Errno::EINVAL, "the range is outside the export");
        self.offset.checked_add(offset).ok_or_else(outside)
    }
}

impl Filter for WindowExport {
    fn inner(&self) -> &dyn Export {
        &*self.inner
    }

    fn info(&self) -> ExportInfo {
        let mut info = self.inner.info();
        info.size = self.size;
        info
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.inner.read_at(self.inside(offset)?, buffer)
    }

    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        self.inner.try_read_at(self.inside(offset)?, buffer, holes)
    }

    fn map_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        self.inner.map_read(self.inside(offset)?, length, holes, lookup, map)
    }

    fn place_read(&self, offset: u64, length: usize, holes: Holes) -> Option<Box<dyn PlacedRead>> {
        self.inner.place_read(self.inside(offset).ok()?, length, holes)
    }

    fn place_write(&self, offset: u64, length: usize) -> Option<Box<dyn PlacedWrite>> {
        self.inner.place_write(self.inside(offset).ok()?, length)
    }

    fn write_at(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), ExportError> {
        self.inner.write_at(self.inside(offset)?, data, durability)
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        self.inner.try_write_at(self.inside(offset)?, data)
    }

    fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), ExportError> {
        self.inner.trim(self.inside(offset)?, length, durability)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<(), ExportError> {
        self.inner.write_zeroes(self.inside(offset)?, length, mode, speed, durability)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.inner.cache(self.inside(offset)?, length)
    }

    fn block_status(
        &self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        self.inner.block_status(context, self.inside(offset)?, length, max_count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::MemoryExport;
    use nbd_proto::wire::BlockSizes;

    #[test]
    fn a_part_of_a_disk_reads_and_writes_the_bytes_at_its_place() {
        let disk: Arc<dyn Export> = Arc::new(MemoryExport::new(8192));
        let window = Window { offset: 512, size: Some(1024) };
        let part = window.apply(disk.clone()).unwrap();
        assert_eq!(part.info().size, 1024);
        part.write_at(1, b"here", Durability::Cached).unwrap();
        let mut bytes = [0; 6];
        disk.read_at(512, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0here\0");
        part.read_at(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0here\0");
    }

    #[test]
    fn a_part_that_is_not_within_the_disk_is_refused() {
        let disk: Arc<dyn Export> = Arc::new(MemoryExport::new(8192));
        let refused = |offset, size| Window { offset, size }.apply(disk.clone()).err().unwrap();
        assert_eq!(refused(8193, None), WindowError::OffsetTooLarge { offset: 8193, whole: 8192 });
        let (offset, size) = (8000, 193);
        let too_large = WindowError::SizeTooLarge { offset, size, whole: 8192 };
        assert_eq!(refused(offset, Some(size)), too_large);
        let outer = Window { offset: u64::MAX, size: None };
        let inner = Window { offset: 1, size: None };
        assert_eq!(inner.within(outer), Err(WindowError::OffsetOverflow { offset: 1 }));
    }

    /// A disk that takes whole sectors only.
    struct Sectors;

    impl Export for Sectors {
        fn info(&self) -> ExportInfo {
            let mut info = ExportInfo::new(8192);
            info.block_sizes = BlockSizes::new(512, 4096, 1 << 25).unwrap();
            info
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
            Ok(())
        }
    }

    #[test]
    fn a_part_begins_where_a_block_of_the_disk_does() {
        let disk: Arc<dyn Export> = Arc::new(Sectors);
        assert!(Window { offset: 1024, size: None }.apply(disk.clone()).is_ok());
        let refused = Window { offset: 100, size: None }.apply(disk).err();
        assert_eq!(refused, Some(WindowError::Misaligned { offset: 100, minimum: 512 }));
    }
}
