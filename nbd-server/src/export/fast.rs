//! [`FastExport`]: optional calls that make an export fast, and their results.

use nbd_proto::transmission::Durability;

use super::info::ExportError;
use super::placed_read::PlacedRead;
use super::placed_write::PlacedWrite;
use super::read_map::{Holes, Lookup, Mapped, ReadMap};

/// Whether a call may make its thread wait for a disk or a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MayBlock {
    /// It returns within microseconds: the server calls it on the connection's thread.
    No,
    /// It may take long: the server calls it on another thread.
    Yes,
    /// It may take long, and works rather than waits: it keeps a core busy, or holds a lock that
    /// other calls of this export need, as changes of a file do. The server calls it on another
    /// thread, with only a few such calls of one export at a time.
    Busy,
}

/// The result of a read that must not block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TryRead {
    /// The complete buffer is filled.
    Complete,
    /// The read would have had to wait; the buffer's content is undefined.
    WouldBlock,
    /// Only with [`Holes::Told`]: a part of the range, or all of it, reads as zero, and
    /// [`FastExport::map_read`] finds it; the buffer's content is undefined.
    Sparse,
}

/// The result of a write that must not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TryWrite {
    /// All of it is written.
    Complete,
    /// The write would have had to wait; nothing is written.
    WouldBlock,
}

/// The kind of call that [`FastExport::may_block`] is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// [`Export::write_at`](super::Export::write_at) of this many bytes.
    Write(usize, Durability),
    /// [`Export::flush`](super::Export::flush).
    Flush,
    /// [`Export::trim`](super::Export::trim).
    Trim,
    /// [`Export::write_zeroes`](super::Export::write_zeroes).
    WriteZeroes,
    /// [`Export::cache`](super::Export::cache).
    Cache,
    /// [`Export::block_status`](super::Export::block_status).
    BlockStatus,
}

/// Optional calls that make an [`Export`](super::Export) fast: they let the server answer without
/// another thread, without copies, and with holes as holes.
///
/// Every method has a correct default, so an export implements only those that help it. The server
/// finds them through [`Export::fast`](super::Export::fast), which has to return `Some(self)`:
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
    /// Fills `buffer` with the bytes at `offset` (in bytes) if that needs no waiting. With
    /// [`Holes::Told`] it may return [`TryRead::Sparse`] instead, if the lookup of the data finds
    /// zeroes.
    ///
    /// # Errors
    ///
    /// As for [`Export::read_at`](super::Export::read_at), which is then called for the same range:
    /// the client gets its result.
    fn try_read_at(
        &self,
        _offset: u64,
        _buffer: &mut [u8],
        _holes: Holes,
    ) -> Result<TryRead, ExportError> {
        Ok(TryRead::WouldBlock)
    }

    /// Maps a range (in bytes) that is about to be read: appends parts to `map`, which is empty,
    /// until they have `length` bytes. With [`Lookup::MayRead`] it may stop earlier
    /// ([`Mapped::Partial`]) and is called again for the rest: a map should contain at most a few
    /// MiB of [`Content::Bytes`](super::Content). Zeroes are found from metadata; content is not
    /// examined. Use bytes of a file only if they stay in that place forever: the server sends them
    /// from the page cache to the socket without a copy.
    ///
    /// The map must have been true at some moment of the call.
    ///
    /// # Errors
    ///
    /// If the range cannot be mapped; it is then read, and the client gets the result of that.
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

    /// Returns the places of the bytes of a range (in bytes), if they are in files from which the
    /// server can read them as [`read_at`](super::Export::read_at) would. They stay there until the
    /// result is dropped. Must not block: only metadata in memory is examined. Called for ranges
    /// that [`try_read_at`](Self::try_read_at) did not read.
    fn place_read(&self, _offset: u64, _length: usize, _: Holes) -> Option<Box<dyn PlacedRead>> {
        None
    }

    /// Returns the place of a write of `length` bytes at `offset` (in bytes), if it is one place of
    /// a file where the server can write them as [`write_at`](super::Export::write_at) would, not
    /// durably: [`flush`](super::Export::flush) makes them durable. Must not block: only metadata
    /// in memory is examined. Called for writes that [`try_write_at`](Self::try_write_at) did not
    /// carry out.
    fn place_write(&self, _offset: u64, _length: usize) -> Option<Box<dyn PlacedWrite>> {
        None
    }

    /// Returns whether an operation may make its thread wait.
    fn may_block(&self, _operation: Operation) -> MayBlock {
        MayBlock::Yes
    }

    /// Returns whether every change is durable when its call returns, even if that was not
    /// requested. If not, the server may carry out durable changes that arrive at the same time
    /// without durability, and call [`flush`](super::Export::flush) once after them.
    fn is_writethrough(&self) -> bool {
        false
    }

    /// Writes `data` at `offset` (in bytes), not durably, if that needs no waiting. Called for
    /// writes that need not be durable and that may block according to
    /// [`may_block`](Self::may_block).
    ///
    /// # Errors
    ///
    /// As for [`Export::write_at`](super::Export::write_at), which is then called for the same
    /// range: the client gets what that says.
    fn try_write_at(&self, _offset: u64, _data: &[u8]) -> Result<TryWrite, ExportError> {
        Ok(TryWrite::WouldBlock)
    }
}
