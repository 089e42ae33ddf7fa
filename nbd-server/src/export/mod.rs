//! Exports: the [`Export`] trait and its implementations.

mod checkpoint;
mod descriptors;
mod entry;
mod fast;
mod filter;
pub mod filters;
mod flushes;
#[cfg(feature = "image")]
mod image;
mod info;
mod memory;
mod placed_read;
mod placed_write;
mod read_map;
mod registry;

pub use nbd_proto::handshake::MinimumBlockSize;
pub use nbd_proto::transmission::{Durability, Speed, ZeroMode};
pub use nbd_proto::wire::{
    AllocationFlags, BlockDescriptor, BlockSizes, DirtyFlags, Errno, MetaContextName,
    TransmissionFlags,
};

pub use checkpoint::{CheckpointError, Checkpointed, PointInTimeView, StatusFn};
pub use descriptors::Descriptors;
pub use entry::ExportEntry;
pub use fast::{FastExport, MayBlock, Operation, TryRead, TryWrite};
pub use filter::Filter;
pub(crate) use flushes::{DurabilityFailures, OwnSync, UnderWay, Waiter};
#[cfg(feature = "image")]
pub use image::{CountedLayers, ImageExport};
pub use info::{ExportError, ExportInfo};
pub use memory::MemoryExport;
pub use placed_read::{PlacedFile, PlacedPart, PlacedRead, Placement};
pub use placed_write::PlacedWrite;
pub use read_map::{Content, FileSpan, Holes, Lookup, Mapped, ReadMap, Segment};
pub use registry::ExportRegistry;

/// A disk that a server serves.
///
/// # Required methods
///
/// [`info`](Self::info) and [`read_at`](Self::read_at) are enough for a read-only export; a
/// writable one also needs [`write_at`](Self::write_at). Each further command of the protocol needs
/// its method and its flag in [`ExportInfo::flags`]; without the flag the server refuses the
/// command and never calls the method.
///
/// | method | flag | command |
/// |---|---|---|
/// | [`write_at`](Self::write_at) | no `READ_ONLY` | WRITE |
/// | [`flush`](Self::flush) | `SEND_FLUSH` | FLUSH |
/// | [`trim`](Self::trim) | `SEND_TRIM` | TRIM |
/// | [`write_zeroes`](Self::write_zeroes) | `SEND_WRITE_ZEROES`, `SEND_FAST_ZERO` | WRITE_ZEROES |
/// | [`cache`](Self::cache) | `SEND_CACHE` | CACHE |
/// | [`block_status`](Self::block_status) | [`ExportInfo::meta_contexts`] | BLOCK_STATUS |
///
/// `SEND_FUA` means that [`Durability::Fua`] is obeyed, and `CAN_MULTI_CONN` that a flush on one
/// connection covers the writes that were answered on every other.
///
/// # Speed
///
/// [`FastExport`], which [`fast`](Self::fast) returns, lets the server answer without another
/// thread, without copies, and with holes as holes. An export without it is served correctly.
///
/// # Calls
///
/// Calls are synchronous and come from several threads at once. Ranges are within the disk and not
/// empty, and offset and length are multiples of its minimum block size if that is enforced.
/// Overlapping requests are called in any order. A call that panics is answered with EIO, and the
/// connection continues.
///
/// # Example
///
/// A disk that can be read only, whose second half is a hole:
///
/// ```
/// use nbd_server::export::{
///     AllocationFlags, BlockDescriptor, Descriptors, Export, ExportError, ExportInfo,
///     MetaContextName, TransmissionFlags,
/// };
///
/// const HALF: u64 = 512 << 10;
///
/// struct Ones;
///
/// impl Export for Ones {
///     fn info(&self) -> ExportInfo {
///         let mut info = ExportInfo::new(2 * HALF);
///         info.flags |= TransmissionFlags::READ_ONLY;
///         info.meta_contexts.push(MetaContextName::base_allocation());
///         info
///     }
///
///     fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
///         for (byte, position) in buffer.iter_mut().zip(offset..) {
///             *byte = u8::from(position < HALF);
///         }
///         Ok(())
///     }
///
///     fn block_status(
///         &self,
///         _context: &MetaContextName,
///         offset: u64,
///         length: u64,
///         max_count: usize,
///     ) -> Result<Vec<BlockDescriptor>, ExportError> {
///         let hole = AllocationFlags::STATE_HOLE | AllocationFlags::STATE_ZERO;
///         let data = HALF.saturating_sub(offset).min(length);
///         let mut status = Descriptors::new(max_count);
///         status.push(data, AllocationFlags::empty().bits());
///         status.push(length - data, hole.bits());
///         Ok(status.into_vec())
///     }
/// }
///
/// let status = Ones.block_status(&MetaContextName::base_allocation(), HALF - 1, 4, 16)?;
/// assert_eq!(status.iter().map(|it| it.length).collect::<Vec<_>>(), [1, 3]);
/// # Ok::<(), ExportError>(())
/// ```
///
/// `examples/memory_export.rs` serves a disk that can be written, in 30 lines.
pub trait Export: Send + Sync + 'static {
    /// Returns the properties of the export. Called several times in a handshake; must not block.
    fn info(&self) -> ExportInfo;

    /// Fills `buffer` with the bytes at `offset` (in bytes). May block.
    ///
    /// # Errors
    ///
    /// If not all bytes can be read; the server then finds out which part of a larger range is
    /// readable.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError>;

    /// Writes `data` at `offset` (in bytes); with [`Durability::Fua`] it is durable on return. May
    /// block.
    ///
    /// # Errors
    ///
    /// If not all of it is written; a part may be.
    fn write_at(&self, _offset: u64, _data: &[u8], _: Durability) -> Result<(), ExportError> {
        Err(ExportError::unsupported())
    }

    /// Makes every write that has returned durable, regardless of its connection. Also called for
    /// every export when the server ends. May block.
    ///
    /// # Errors
    ///
    /// If some write may not be durable.
    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    /// Declares a range (in bytes) unneeded; it may read as anything afterwards. May block.
    ///
    /// # Errors
    ///
    /// Any failure; if no space can be freed, that is not an error.
    fn trim(&self, _offset: u64, _length: u64, _: Durability) -> Result<(), ExportError> {
        Err(ExportError::unsupported())
    }

    /// Makes a range (in bytes) read as zeroes. May block.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOTSUP`], at once and with nothing changed, if only a fast way is permitted and
    /// there is none; otherwise any failure.
    fn write_zeroes(
        &self,
        _offset: u64,
        _length: u64,
        _: ZeroMode,
        _: Speed,
        _: Durability,
    ) -> Result<(), ExportError> {
        Err(ExportError::unsupported())
    }

    /// Announces that a range (in bytes) will be read soon. May block.
    ///
    /// # Errors
    ///
    /// Any failure.
    fn cache(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        Err(ExportError::unsupported())
    }

    /// Returns the status of a range (in bytes) in one of the export's contexts, from its start on,
    /// in at most `max_count` descriptors (at least 1). The result may cover less than the range,
    /// but never nothing, and never more. If much has to be examined, return a part of it rather
    /// than block for longer than a few milliseconds: the server asks for the rest.
    ///
    /// # Errors
    ///
    /// If the status cannot be found.
    fn block_status(
        &self,
        _context: &MetaContextName,
        _offset: u64,
        _length: u64,
        _max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        Err(ExportError::unsupported())
    }

    /// Returns the calls that make the export fast, if it has them: `Some(self)` for a type that
    /// implements [`FastExport`]. Called for each request.
    fn fast(&self) -> Option<&dyn FastExport> {
        None
    }
}

/// The calls of [`FastExport`] on any export, with the defaults for an export without them.
impl dyn Export + '_ {
    /// See [`FastExport::try_read_at`].
    ///
    /// # Errors
    ///
    /// As for [`Export::read_at`].
    pub fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        match self.fast() {
            Some(fast) => fast.try_read_at(offset, buffer, holes),
            None => Ok(TryRead::WouldBlock),
        }
    }

    /// See [`FastExport::map_read`].
    ///
    /// # Errors
    ///
    /// As for [`FastExport::map_read`].
    pub fn map_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        match self.fast() {
            Some(fast) => fast.map_read(offset, length, holes, lookup, map),
            None => {
                map.push_export(length);
                Ok(Mapped::Complete)
            }
        }
    }

    /// See [`FastExport::may_block`].
    #[must_use]
    pub fn may_block(&self, operation: Operation) -> MayBlock {
        self.fast().map_or(MayBlock::Yes, |fast| fast.may_block(operation))
    }

    /// See [`FastExport::place_read`].
    #[must_use]
    pub fn place_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
    ) -> Option<Box<dyn PlacedRead>> {
        self.fast()?.place_read(offset, length, holes)
    }

    /// See [`FastExport::place_write`].
    #[must_use]
    pub fn place_write(&self, offset: u64, length: usize) -> Option<Box<dyn PlacedWrite>> {
        self.fast()?.place_write(offset, length)
    }

    /// See [`FastExport::is_writethrough`].
    #[must_use]
    pub fn is_writethrough(&self) -> bool {
        self.fast().is_some_and(FastExport::is_writethrough)
    }

    /// See [`FastExport::try_write_at`].
    ///
    /// # Errors
    ///
    /// As for [`Export::write_at`].
    pub fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        match self.fast() {
            Some(fast) => fast.try_write_at(offset, data),
            None => Ok(TryWrite::WouldBlock),
        }
    }
}
