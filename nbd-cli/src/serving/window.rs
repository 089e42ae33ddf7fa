//! A part of a disk as a disk of its own.

use std::sync::Arc;

use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextName};
use nbd_server::export::{
    Durability, Export, ExportError, ExportInfo, Filter, Holes, Lookup, Mapped, ReadMap, Speed,
    TryRead, TryWrite, ZeroMode,
};

use crate::error::CommandError;

/// Which part of a disk is exported, in bytes. The default is all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) offset: u64,
    /// `None`: to the end.
    pub(crate) size: Option<u64>,
}

impl Window {
    /// Whether the part lies within a disk of `whole` bytes.
    ///
    /// # Errors
    ///
    /// A sentence if it does not.
    pub(crate) fn check(self, whole: u64) -> Result<(), String> {
        let Some(rest) = whole.checked_sub(self.offset) else {
            return Err(format!(
                "Offset {} is behind the end of the image ({whole} bytes)",
                self.offset
            ));
        };
        match self.size {
            Some(size) if size > rest => Err(format!(
                "Offset {} and size {size} reach behind the end of the image ({whole} bytes)",
                self.offset
            )),
            _ => Ok(()),
        }
    }

    /// The part `of_this` of this part.
    ///
    /// # Errors
    ///
    /// A sentence if it does not lie within this one.
    pub(crate) fn narrowed(self, of_this: Self) -> Result<Self, String> {
        let size = match self.size {
            None => of_this.size,
            Some(whole) => {
                of_this.check(whole)?;
                Some(of_this.size.unwrap_or(whole.saturating_sub(of_this.offset)))
            }
        };
        let offset = self.offset.checked_add(of_this.offset);
        let offset = offset.ok_or_else(|| format!("Offset {} is out of range", of_this.offset))?;
        Ok(Self { offset, size })
    }

    /// The part of `inner`, or `inner` itself for all of it.
    ///
    /// # Errors
    ///
    /// If the part does not lie within the disk.
    pub(crate) fn of(self, inner: Arc<dyn Export>) -> Result<Arc<dyn Export>, CommandError> {
        let whole = inner.info().size;
        if self == Self::default() {
            return Ok(inner);
        }
        self.check(whole).map_err(CommandError::new)?;
        let size = self.size.unwrap_or(whole.saturating_sub(self.offset));
        Ok(Arc::new(Part { inner, offset: self.offset, size }))
    }
}

/// The server keeps requests within the size, so that no sum here leaves the inner disk.
struct Part {
    inner: Arc<dyn Export>,
    offset: u64,
    size: u64,
}

impl Part {
    fn inside(&self, offset: u64) -> Result<u64, ExportError> {
        let outside = || ExportError::new(Errno::EINVAL, "the range is outside the export");
        self.offset.checked_add(offset).ok_or_else(outside)
    }
}

impl Filter for Part {
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
