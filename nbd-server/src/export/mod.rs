//! What a server serves: the [`Export`] trait and its implementations.

mod checkpoint;
mod descriptors;
mod filter;
pub mod filters;
mod flushes;
#[cfg(feature = "image")]
mod image;
mod memory;
mod placed_read;
mod read_map;
mod registry;

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nbd_proto::wire::{BlockDescriptor, BlockSizes, Errno, MetaContextName, TransmissionFlags};

pub use nbd_proto::handshake::MinimumBlockSize;
pub use nbd_proto::transmission::{Durability, Speed, ZeroMode};

pub use checkpoint::{CheckpointError, Checkpointed, PointInTimeView, StatusFn};
pub use descriptors::Descriptors;
pub use filter::Filter;
pub(crate) use flushes::{DurabilityFailures, UnderWay, Waiter};
#[cfg(feature = "image")]
pub use image::{CountedLayers, ImageExport};
pub use memory::MemoryExport;
pub use placed_read::{Place, PlacedFile, PlacedPart, PlacedRead};
pub use read_map::{Content, Holes, Lookup, Mapped, ReadMap, Segment};
pub use registry::{ExportEntry, ExportRegistry};

/// What a client is told about an export. All sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportInfo {
    /// Size of the disk; at most 2^63-1. Fixed while a client is connected.
    pub size: u64,
    /// What the export can do. The server itself adds what it provides for every export:
    /// HAS_FLAGS, SEND_DF and BLOCK_STATUS_PAYLOAD.
    pub flags: TransmissionFlags,
    /// Which requests the export accepts and likes; enforced by the server.
    pub block_sizes: BlockSizes,
    /// Whether the smallest of them is enforced; if not, the methods take any alignment.
    pub minimum_block_size: MinimumBlockSize,
    /// The metadata contexts [`Export::block_status`] can answer.
    pub meta_contexts: Vec<MetaContextName>,
}

impl ExportInfo {
    /// A disk of `size` bytes that takes requests of any alignment and can do nothing special.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            flags: TransmissionFlags::HAS_FLAGS,
            block_sizes: BlockSizes::default(),
            minimum_block_size: MinimumBlockSize::Enforced,
            meta_contexts: Vec::new(),
        }
    }
}

/// A request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct ExportError {
    /// The error the client gets.
    pub errno: Errno,
    /// A text for people. It is sent to the client: name no paths of this machine in it.
    pub message: Cow<'static, str>,
}

impl ExportError {
    /// An error with a text for people, which is sent to the client.
    #[must_use]
    pub fn new(errno: Errno, message: impl Into<Cow<'static, str>>) -> Self {
        Self { errno, message: message.into() }
    }

    fn unsupported() -> Self {
        Self::new(Errno::ENOTSUP, "the export cannot do this")
    }
}

/// Whether a call may make its thread wait for a disk or a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MayBlock {
    /// It returns within microseconds: the server calls it where it stands.
    No,
    /// It may take long: the server calls it on another thread.
    Yes,
    /// It may take long, and it is work rather than waiting: it keeps a core busy, or a lock that
    /// other calls of this export need, as changes of a file do. The server calls it on another
    /// thread, and has only a few such calls of one export under way at a time.
    Busy,
}

/// What a read that must not block achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TryRead {
    /// The whole buffer is filled.
    Complete,
    /// It would have had to wait; the buffer's content is undefined.
    WouldBlock,
    /// With [`Holes::Told`] only: a part of the range, or all of it, reads as zero, as
    /// [`FastExport::map_read`] tells; the buffer's content is undefined.
    Sparse,
}

/// What a write that must not wait achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TryWrite {
    /// All of it is written.
    Complete,
    /// It would have had to wait.
    WouldBlock,
}

/// Which kind of call [`FastExport::may_block`] is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// [`Export::write_at`] of this many bytes.
    Write(usize, Durability),
    /// [`Export::flush`].
    Flush,
    /// [`Export::trim`].
    Trim,
    /// [`Export::write_zeroes`].
    WriteZeroes,
    /// [`Export::cache`].
    Cache,
    /// [`Export::block_status`].
    BlockStatus,
}

/// A part of a file whose bytes are the bytes of the disk, and stay in that place for ever.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FileSpan {
    /// The file.
    pub file: Arc<OwnedFd>,
    /// Where the bytes are in it, in bytes from its start.
    pub offset: u64,
}

impl FileSpan {
    /// The bytes of `file` from `offset` on, in bytes from its start.
    #[must_use]
    pub const fn new(file: Arc<OwnedFd>, offset: u64) -> Self {
        Self { file, offset }
    }
}

/// A disk that a server serves.
///
/// # What has to be written
///
/// [`info`](Self::info) and [`read_at`](Self::read_at) make a read-only export, with
/// [`write_at`](Self::write_at) a writable one. Each further command of the protocol needs its method
/// and its flag in [`ExportInfo::flags`]; without the flag the server refuses the command and never
/// calls the method.
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
/// `SEND_FUA` says that [`Durability::Fua`] is obeyed, and `CAN_MULTI_CONN` that a flush on one
/// connection covers the writes that were answered on every other.
///
/// # What makes it fast
///
/// [`FastExport`], which [`fast`](Self::fast) returns, lets the server answer without another
/// thread, without copies, and with holes as holes. An export without it is served correctly.
///
/// # Calls
///
/// Calls are synchronous and come from several threads at once. Ranges lie within the disk, and
/// begin and end at its minimum block size; their length is not zero. Requests that overlap are
/// called in any order. A call that panics is answered with EIO, and everything else goes on.
///
/// `examples/memory_export.rs` is a complete export in 30 lines.
pub trait Export: Send + Sync + 'static {
    /// What clients are told. Asked several times in a handshake; must not block.
    fn info(&self) -> ExportInfo;

    /// Fills `buffer` from `offset` (in bytes) on. May block.
    ///
    /// # Errors
    ///
    /// Whatever kept the bytes from being read; the server then finds out by itself which part of a
    /// larger range can be read.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError>;

    /// Writes `data` at `offset` (in bytes), durably before it returns if asked to.
    ///
    /// # Errors
    ///
    /// Whatever kept it from being written; part of it may be.
    fn write_at(&self, _offset: u64, _data: &[u8], _: Durability) -> Result<(), ExportError> {
        Err(ExportError::unsupported())
    }

    /// Makes every write that has returned durable, on whichever connection it came. Also called
    /// for every export when the server ends.
    ///
    /// # Errors
    ///
    /// If durability is not known.
    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    /// The range is not needed any more; it reads as anything afterwards.
    ///
    /// # Errors
    ///
    /// Whatever went wrong; having nothing to give back is not an error.
    fn trim(&self, _offset: u64, _length: u64, _: Durability) -> Result<(), ExportError> {
        Err(ExportError::unsupported())
    }

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOTSUP`], at once and with nothing changed, if only a fast way is wanted and there
    /// is none.
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

    /// The range will be read soon.
    ///
    /// # Errors
    ///
    /// Whatever went wrong.
    fn cache(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        Err(ExportError::unsupported())
    }

    /// The status of a range (in bytes) in one of the export's contexts, from its start on, in at
    /// most `max_count` descriptors (at least 1). It may cover less than the range, but never
    /// nothing, and never more: where much would have to be looked at, a part of it is better than a
    /// call that takes longer than a few milliseconds. The server asks for the rest.
    ///
    /// # Errors
    ///
    /// Whatever kept the status from being found.
    fn block_status(
        &self,
        _context: &MetaContextName,
        _offset: u64,
        _length: u64,
        _max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        Err(ExportError::unsupported())
    }

    /// The calls that make the export fast, if it has them: `Some(self)` for a type that implements
    /// [`FastExport`]. Asked for each request.
    fn fast(&self) -> Option<&dyn FastExport> {
        None
    }
}

/// What makes an [`Export`] fast: the server answers without another thread, without copies, and
/// with holes as holes.
///
/// Every method has a default that is right, so that an export implements only those that help it. The
/// server finds them through [`Export::fast`], which has to return `Some(self)`:
///
/// ```
/// # use nbd_server::export::{Export, ExportError, ExportInfo, FastExport, MayBlock, Operation};
/// struct Zeroes;
///
/// impl Export for Zeroes {
///     fn info(&self) -> ExportInfo {
///         ExportInfo::new(1 << 30)
///     }
///
///     fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
///         buffer.fill(0);
///         Ok(())
///     }
///
///     fn fast(&self) -> Option<&dyn FastExport> {
///         Some(self)
///     }
/// }
///
/// impl FastExport for Zeroes {
///     fn may_block(&self, _: Operation) -> MayBlock {
///         MayBlock::No
///     }
/// }
/// ```
pub trait FastExport: Send + Sync {
    /// Fills `buffer` if that takes no waiting. With [`Holes::Told`] it may say
    /// [`TryRead::Sparse`] instead, from the same look at the metadata that finds the data.
    ///
    /// # Errors
    ///
    /// As for [`Export::read_at`], which is then called for the same range: the client gets
    /// what that says.
    fn try_read_at(
        &self,
        _offset: u64,
        _buffer: &mut [u8],
        _holes: Holes,
    ) -> Result<TryRead, ExportError> {
        Ok(TryRead::WouldBlock)
    }

    /// Tells what a range that is about to be read consists of: appends parts to `map`, which is
    /// empty, until they have `length` bytes. With [`Lookup::MayRead`] it may stop before that
    /// ([`Mapped::Partial`]) and is asked for the rest: a map that holds bytes should have no more
    /// than some MiB of them. Zeroes are told where metadata knows of them; content
    /// is not looked at. Bytes of a file may be told only if they stay in that place for ever: the
    /// server hands them from the page cache to the socket without a copy.
    ///
    /// What is told must have been true at some moment of the call.
    ///
    /// # Errors
    ///
    /// Whatever kept it from being found out; the range is then read, and the client gets what that
    /// says.
    fn map_read(
        &self,
        _offset: u64,
        length: usize,
        _holes: Holes,
        _lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        map.push_export(length);
        Ok(Mapped::Complete)
    }

    /// Tells where the bytes of a range lie, if they lie in files from which the server can read them as
    /// [`read_at`](Export::read_at) would. They stay there until the answer is dropped. Only what is in
    /// memory is looked at. Asked for ranges that [`try_read_at`](Self::try_read_at) did not give.
    fn place_read(&self, _offset: u64, _length: usize, _: Holes) -> Option<Box<dyn PlacedRead>> {
        None
    }

    /// Whether an operation may make its thread wait.
    fn may_block(&self, _operation: Operation) -> MayBlock {
        MayBlock::Yes
    }

    /// Whether every change is durable when its call returns, also one that need not be. Where it is not,
    /// changes that have to be durable and arrive at the same time may be called as if they need not be,
    /// with one [`flush`](Export::flush) after them.
    fn is_writethrough(&self) -> bool {
        false
    }

    /// Writes `data` at `offset` (in bytes), not durably, if that takes no waiting. Asked for writes
    /// that need not be durable and for which [`may_block`](Self::may_block) says that they may
    /// block.
    ///
    /// # Errors
    ///
    /// As for [`Export::write_at`], which is then called for the same range: the client
    /// gets what that says.
    fn try_write_at(&self, _offset: u64, _data: &[u8]) -> Result<TryWrite, ExportError> {
        Ok(TryWrite::WouldBlock)
    }
}

/// The calls of [`FastExport`] on any export. One that has none gets the defaults.
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
