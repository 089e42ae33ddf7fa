//! Filters: exports that wrap other exports.

use nbd_proto::wire::{BlockDescriptor, MetaContextName};

use super::{
    Durability, Export, ExportError, ExportInfo, FastExport, Holes, Lookup, Mapped, MayBlock,
    Operation, PlacedRead, PlacedWrite, ReadMap, Speed, TryRead, TryWrite, ZeroMode,
};

/// An export that wraps another one: every call is forwarded, except for the methods that are
/// overridden. They correspond to those of [`Export`], with the same contract; every filter is an
/// export.
///
/// A forwarded call costs as much as a call of the inner export. Rules:
///
/// - An override of [`write_at`](Self::write_at) needs one of [`try_write_at`](Self::try_write_at)
///   too, which may return [`TryWrite::WouldBlock`]; likewise for [`read_at`](Self::read_at),
///   [`try_read_at`](Self::try_read_at) (or [`TryRead::WouldBlock`]) and
///   [`map_read`](Self::map_read) (or [`ReadMap::push_export`] of the complete range).
/// - A filter that makes a call block reports it in [`may_block`](Self::may_block).
/// - [`info`](Self::info) offers only what the methods implement.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use nbd_server::export::{Export, ExportError, Filter, MemoryExport};
///
/// /// Counts flushes.
/// struct Counting {
///     inner: Arc<dyn Export>,
///     flushes: AtomicU64,
/// }
///
/// impl Filter for Counting {
///     fn inner(&self) -> &dyn Export {
///         &*self.inner
///     }
///
///     fn flush(&self) -> Result<(), ExportError> {
///         self.flushes.fetch_add(1, Ordering::Relaxed);
///         self.inner.flush()
///     }
/// }
///
/// let inner = Arc::new(MemoryExport::new(1 << 20));
/// let counting = Arc::new(Counting { inner, flushes: AtomicU64::new(0) });
/// let export: Arc<dyn Export> = counting.clone();
/// export.flush()?;
/// assert_eq!(export.info().size, 1 << 20);
/// assert_eq!(counting.flushes.load(Ordering::Relaxed), 1);
/// # Ok::<(), ExportError>(())
/// ```
pub trait Filter: Send + Sync + 'static {
    /// Returns the inner export, always the same one.
    fn inner(&self) -> &dyn Export;

    /// See [`Export::info`].
    fn info(&self) -> ExportInfo {
        self.inner().info()
    }

    /// See [`Export::read_at`].
    ///
    /// # Errors
    ///
    /// Those of the inner export, as for all methods below.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.inner().read_at(offset, buffer)
    }

    /// See [`FastExport::try_read_at`].
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        self.inner().try_read_at(offset, buffer, holes)
    }

    /// See [`FastExport::map_read`].
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    fn map_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        self.inner().map_read(offset, length, holes, lookup, map)
    }

    /// See [`FastExport::place_read`]. By default it returns `None`, so that a filter that changes
    /// read data need not override it.
    fn place_read(&self, _offset: u64, _length: usize, _: Holes) -> Option<Box<dyn PlacedRead>> {
        None
    }

    /// See [`FastExport::place_write`]. By default it returns `None`, so that a filter sees every
    /// write.
    fn place_write(&self, _offset: u64, _length: usize) -> Option<Box<dyn PlacedWrite>> {
        None
    }

    /// See [`FastExport::may_block`].
    fn may_block(&self, operation: Operation) -> MayBlock {
        self.inner().may_block(operation)
    }

    /// See [`FastExport::is_writethrough`].
    fn is_writethrough(&self) -> bool {
        self.inner().is_writethrough()
    }

    /// See [`Export::write_at`].
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    fn write_at(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), ExportError> {
        self.inner().write_at(offset, data, durability)
    }

    /// See [`FastExport::try_write_at`].
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        self.inner().try_write_at(offset, data)
    }

    /// See [`Export::flush`].
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    fn flush(&self) -> Result<(), ExportError> {
        self.inner().flush()
    }

    /// See [`Export::trim`].
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), ExportError> {
        self.inner().trim(offset, length, durability)
    }

    /// See [`Export::write_zeroes`].
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<(), ExportError> {
        self.inner().write_zeroes(offset, length, mode, speed, durability)
    }

    /// See [`Export::cache`].
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.inner().cache(offset, length)
    }

    /// See [`Export::block_status`].
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    fn block_status(
        &self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        self.inner().block_status(context, offset, length, max_count)
    }
}

impl<T: Filter> Export for T {
    fn info(&self) -> ExportInfo {
        Filter::info(self)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        Filter::read_at(self, offset, buffer)
    }

    fn write_at(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), ExportError> {
        Filter::write_at(self, offset, data, durability)
    }

    fn flush(&self) -> Result<(), ExportError> {
        Filter::flush(self)
    }

    fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), ExportError> {
        Filter::trim(self, offset, length, durability)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<(), ExportError> {
        Filter::write_zeroes(self, offset, length, mode, speed, durability)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        Filter::cache(self, offset, length)
    }

    fn block_status(
        &self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        Filter::block_status(self, context, offset, length, max_count)
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl<T: Filter> FastExport for T {
    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        Filter::try_read_at(self, offset, buffer, holes)
    }

    fn map_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        Filter::map_read(self, offset, length, holes, lookup, map)
    }

    fn place_read(&self, offset: u64, length: usize, holes: Holes) -> Option<Box<dyn PlacedRead>> {
        Filter::place_read(self, offset, length, holes)
    }

    fn place_write(&self, offset: u64, length: usize) -> Option<Box<dyn PlacedWrite>> {
        Filter::place_write(self, offset, length)
    }

    fn may_block(&self, operation: Operation) -> MayBlock {
        Filter::may_block(self, operation)
    }

    fn is_writethrough(&self) -> bool {
        Filter::is_writethrough(self)
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        Filter::try_write_at(self, offset, data)
    }
}
