//! [`FastExport`]: what makes an export fast, and the answers of its calls.

use nbd_proto::transmission::Durability;

use super::info::ExportError;
use super::placed_read::PlacedRead;
use super::placed_write::PlacedWrite;
use super::read_map::{Holes, Lookup, Mapped, ReadMap};

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

/// What makes an [`Export`](super::Export) fast: the server answers without another thread, without copies, and
/// with holes as holes.
///
/// Every method has a default that is right, so that an export implements only those that help it. The
/// server finds them through [`Export::fast`](super::Export::fast), which has to return `Some(self)`:
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
    /// As for [`Export::read_at`](super::Export::read_at), which is then called for the same range: the client gets
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
    /// is not looked at. Bytes of a file may be told only if they stay in that place forever: the
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
    /// [`read_at`](super::Export::read_at) would. They stay there until the answer is dropped. Only what is in
    /// memory is examined. Asked for ranges that [`try_read_at`](Self::try_read_at) did not give.
    fn place_read(&self, _offset: u64, _length: usize, _: Holes) -> Option<Box<dyn PlacedRead>> {
        None
    }

    /// Tells where a write of `length` bytes goes, if it goes to one place of a file and the server can write
    /// them there as [`write_at`](super::Export::write_at) would, not durably:
    /// [`flush`](super::Export::flush) makes them durable. Only what is in memory is looked at. Asked for
    /// writes that [`try_write_at`](Self::try_write_at) did not do.
    fn place_write(&self, _offset: u64, _length: usize) -> Option<Box<dyn PlacedWrite>> {
        None
    }

    /// Whether an operation may make its thread wait.
    fn may_block(&self, _operation: Operation) -> MayBlock {
        MayBlock::Yes
    }

    /// Whether every change is durable when its call returns, also one that need not be. Where it is not,
    /// changes that have to be durable and arrive at the same time may be called as if they need not be,
    /// with one [`flush`](super::Export::flush) after them.
    fn is_writethrough(&self) -> bool {
        false
    }

    /// Writes `data` at `offset` (in bytes), not durably, if that takes no waiting. Asked for writes
    /// that need not be durable and for which [`may_block`](Self::may_block) says that they may
    /// block.
    ///
    /// # Errors
    ///
    /// As for [`Export::write_at`](super::Export::write_at), which is then called for the same range: the client
    /// gets what that says.
    fn try_write_at(&self, _offset: u64, _data: &[u8]) -> Result<TryWrite, ExportError> {
        Ok(TryWrite::WouldBlock)
    }
}
