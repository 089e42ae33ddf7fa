//! What a ring is asked for, and what becomes of it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nbd_proto::transmission::Durability;
use nbd_proto::wire::Errno;

use super::layout::Layout;
use super::spare::Spare;
use crate::error::system_words;
use crate::export::{ExportError, PlacedRead, PlacedWrite};
use crate::log_limit::may_warn;
use crate::reply_bytes::ReplyBytes;

/// Reads that are submitted together. The disk works on them while the next ones of the batch
/// begin: it would be idle while a long batch is prepared. More calls cost more CPU time.
const READS_TOGETHER: usize = 4;
/// Writes that are submitted together. The kernel reports the end of each by itself, so smaller
/// groups wake the thread more often.
const WRITES_TOGETHER: usize = 8;

/// A read to be carried out: bytes of one file, between bytes that are known already.
pub(crate) struct RingRead {
    /// Where the bytes are. It is kept until they have arrived.
    pub(crate) placed: Box<dyn PlacedRead>,
    /// The [number](PlacedRead::file) of the file, and the offset and the length of the bytes in
    /// it.
    pub(crate) number: usize,
    pub(crate) offset: u64,
    pub(crate) length: usize,
    /// The bytes before and after them.
    pub(crate) head: Vec<u8>,
    pub(crate) tail: Vec<u8>,
}

/// The receiver of a read.
pub(crate) trait Reader: Send {
    /// All bytes: the head, those of the file, and the tail.
    fn filled(self: Box<Self>, bytes: ReplyBytes);

    /// The ring has not read it: the pool has to.
    fn failed(self: Box<Self>);
}

/// A write to be carried out.
pub(crate) struct RingWrite {
    /// Where the bytes go. It is kept until they are there.
    pub(crate) placed: Box<dyn PlacedWrite>,
    pub(crate) payload: Vec<u8>,
    /// Whether the bytes are to be on stable storage when it is over.
    pub(crate) durability: Durability,
}

/// The receiver of the result of a write.
pub(crate) trait Writer: Send {
    /// Whether the write is not wanted any more, unless it has begun.
    fn is_abandoned(&self) -> bool;

    /// It is over.
    fn written(self: Box<Self>, result: Result<(), ExportError>);

    /// The ring has not written it, or only a part of it: the pool has to write the payload.
    fn failed(self: Box<Self>, payload: Vec<u8>);

    /// The write to stable storage has failed for want of space, or so the system says.
    fn found_no_space(self: Box<Self>, write: FullWrite);
}

/// A write to stable storage that has failed with an error for want of space. The system says so
/// as well of data that was written before and whose place is chosen late, once: such data is lost,
/// and the error is that of all clients.
pub(crate) struct FullWrite {
    /// `None` if it is known that nothing was lost.
    placed: Option<Box<dyn PlacedWrite>>,
    buffer: Vec<u8>,
    /// The payload is in the buffer from byte `at` on.
    at: usize,
    length: usize,
    error: io::Error,
}

impl FullWrite {
    /// Finds the cause, and returns the error for the client, or as `Err` the one for all clients.
    /// If the bytes have space now, it was the sync that failed. Blocks.
    pub(crate) fn cause(mut self) -> Result<ExportError, ExportError> {
        let bytes = self.buffer.get(self.at..self.at + self.length).unwrap_or_default();
        let placed = self.placed.as_ref();
        let written = placed.and_then(|placed| {
            placed.file().map(|file| rustix::io::pwrite(file.fd, bytes, placed.offset()))
        });
        match written {
            Some(Err(error)) if is_full(&error.into()) => {
                self.placed = None;
                log(&self.error);
                Ok(ExportError::new(Errno::ENOSPC, "no space is left where the image is stored"))
            }
            _ => Err(lost(&self.error)),
        }
    }
}

impl Drop for FullWrite {
    fn drop(&mut self) {
        if let Some(placed) = self.placed.take() {
            note_failed(placed, &self.error);
        }
    }
}

/// Work that has not begun. The place is the first field, so that it is dropped before the
/// receiver, which holds the export.
pub(super) enum Work {
    Read(RingRead, Box<dyn Reader>),
    Write(RingWrite, Box<dyn Writer>),
}

impl Work {
    pub(super) fn length(&self) -> usize {
        match self {
            Self::Read(read, _) => read.length,
            Self::Write(write, _) => write.payload.len(),
        }
    }

    /// How many of the kind are submitted with one system call, if a batch has so many.
    pub(super) fn together(&self) -> usize {
        match self {
            Self::Read(..) => READS_TOGETHER,
            Self::Write(..) => WRITES_TOGETHER,
        }
    }

    /// Whether it still has to be done if its connection has ended.
    pub(super) fn outlives_connection(&self) -> bool {
        match self {
            Self::Read(..) => false,
            Self::Write(_, writer) => !writer.is_abandoned(),
        }
    }

    /// The ring cannot do it.
    pub(super) fn refuse(self) -> Outcome {
        match self {
            Self::Read(_, reader) => Outcome::Unread(reader),
            Self::Write(RingWrite { placed, payload, .. }, writer) => {
                drop(placed);
                Outcome::Unwritten(writer, payload)
            }
        }
    }
}

/// What became of a read or a write. Its receiver learns it without the lock of the ring.
#[must_use]
pub(super) enum Outcome {
    Filled(Box<dyn Reader>, ReplyBytes),
    Unread(Box<dyn Reader>),
    Written(Box<dyn PlacedWrite>, Box<dyn Writer>),
    Unwritten(Box<dyn Writer>, Vec<u8>),
    /// A write to stable storage failed, and may have taken the error of other data: it must not be
    /// repeated as if nothing had happened.
    Lost(Box<dyn PlacedWrite>, Box<dyn Writer>, io::Error),
    /// The same, unless its own bytes have no space.
    Full(FullWrite, Box<dyn Writer>),
}

impl Outcome {
    pub(super) fn deliver(self) {
        match self {
            Self::Filled(reader, bytes) => reader.filled(bytes),
            Self::Unread(reader) => reader.failed(),
            Self::Written(placed, writer) => {
                let written = catch_unwind(AssertUnwindSafe(|| placed.written()));
                writer.written(written.unwrap_or_else(|_| {
                    tracing::error!("the end of a write panicked");
                    Err(ExportError::new(Errno::EIO, "the server failed"))
                }));
            }
            Self::Unwritten(writer, payload) => writer.failed(payload),
            Self::Lost(placed, writer, error) => {
                note_failed(placed, &error);
                writer.written(Err(lost(&error)));
            }
            Self::Full(write, writer) => writer.found_no_space(write),
        }
    }
}

/// Tells an export that data may be lost.
fn note_failed(placed: Box<dyn PlacedWrite>, error: &io::Error) {
    if catch_unwind(AssertUnwindSafe(|| placed.failed(error))).is_err() {
        tracing::error!("the end of a write panicked");
    }
}

/// Whether an error says that there is no space.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What the client is told of a write to stable storage that failed.
fn lost(error: &io::Error) -> ExportError {
    log(error);
    ExportError::new(Errno::EIO, "the image cannot be written here")
}

fn log(error: &io::Error) {
    if may_warn() {
        tracing::warn!(error = system_words(error), "a durable write failed");
    }
}

/// Whether the system says with an error that it has not begun to write, or that the file cannot be
/// written in this way. Not so `EINTR` and `ENOMEM`: a sync may report them for data that was lost
/// before, and only once.
///
/// Such a write is repeated by the pool, which is right even if a part of the bytes is there: they
/// are the same, and until the reply the order among this and overlapping requests is open. The
/// pool asks the export for the place again, so that it does not matter if that has moved
/// meanwhile.
fn is_refusal(error: &io::Error) -> bool {
    let refusals = [
        libc::EINVAL,
        libc::EOPNOTSUPP,
        libc::ENOSYS,
        libc::EBADF,
        libc::EAGAIN,
        // The ring itself says so of what it has not started.
        libc::ECANCELED,
    ];
    error.raw_os_error().is_some_and(|code| refusals.contains(&code))
}

/// Started work: what it holds until it has ended.
pub(super) enum Flight {
    /// The file and the lease are let go when it has ended.
    Read { placed: Box<dyn PlacedRead>, layout: Layout, reader: Box<dyn Reader> },
    /// The payload is in the buffer from byte `at` on.
    Write {
        placed: Box<dyn PlacedWrite>,
        at: usize,
        length: usize,
        durability: Durability,
        writer: Box<dyn Writer>,
    },
}

impl Flight {
    /// Whether it is a write that need not be on stable storage when it is over.
    pub(super) fn is_cached_write(&self) -> bool {
        matches!(self, Self::Write { durability: Durability::Cached, .. })
    }

    /// It has ended, with so many bytes moved, or was never begun.
    pub(super) fn end(
        self,
        buffer: Vec<u8>,
        result: Option<io::Result<usize>>,
        spare: &mut Spare,
    ) -> Outcome {
        let (moved, error) = match result.transpose() {
            Ok(moved) => (moved, None),
            Err(error) => (None, Some(error)),
        };
        match self {
            Self::Read { placed, layout, reader } => {
                drop(placed);
                match moved.and_then(|moved| layout.finish(buffer, moved)) {
                    Some(bytes) => Outcome::Filled(reader, bytes),
                    None => Outcome::Unread(reader),
                }
            }
            Self::Write { placed, length, writer, .. } if moved == Some(length) => {
                spare.give_back(buffer);
                Outcome::Written(placed, writer)
            }
            Self::Write { placed, at, length, durability, writer } => match error {
                Some(error) if durability == Durability::Fua && is_full(&error) => {
                    let placed = Some(placed);
                    Outcome::Full(FullWrite { placed, buffer, at, length, error }, writer)
                }
                Some(error) if durability == Durability::Fua && !is_refusal(&error) => {
                    Outcome::Lost(placed, writer, error)
                }
                _ => {
                    drop(placed);
                    Outcome::Unwritten(writer, payload_in(buffer, at, length))
                }
            },
        }
    }
}

/// The payload of a write, out of its buffer.
fn payload_in(mut buffer: Vec<u8>, at: usize, length: usize) -> Vec<u8> {
    buffer.truncate(at + length);
    if at > 0 {
        buffer.drain(..at);
    }
    buffer
}
