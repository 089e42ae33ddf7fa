//! Carries out a validated request, and encodes its reply.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use nbd_proto::transmission::{
    Command, Durability, Fragmentation, Position, ReplyEncoder, Request, RequestTag,
};
use nbd_proto::wire::{
    BlockDescriptor, Errno, MetaContextId, MetaContextName, ReplyMode, TransmissionFlags,
};

use super::writeback_errors::WritebackErrors;
use crate::export::{
    Export, ExportError, Holes, Lookup, Mapped, PlacedRead, PlacedWrite, ReadMap, TryRead, TryWrite,
};
use crate::statistics::{Outcome, Ticket};

/// A request that is ready for execution.
pub(super) struct PreparedRequest {
    pub(super) export: Arc<dyn Export>,
    pub(super) contexts: Arc<[(MetaContextId, MetaContextName)]>,
    pub(super) encoder: ReplyEncoder,
    pub(super) request: Request,
    pub(super) ticket: Ticket,
    pub(super) writeback: Arc<WritebackErrors>,
    /// The payload of a WRITE, otherwise empty.
    pub(super) payload: Vec<u8>,
    /// Maximum number of descriptors per context in the answer to a BLOCK_STATUS.
    pub(super) max_descriptors: usize,
    /// The number of bytes of a READ that were answered before.
    pub(super) done: usize,
    /// Whether a change that has to be durable is followed by a flush.
    pub(super) is_flushed_later: bool,
}

/// The result of a step.
pub(super) enum Step {
    /// The request is carried out; this is the reply, or the rest of it.
    Done(Vec<u8>, Outcome),
    /// The change is carried out; a flush is still needed.
    Changed,
    /// A part of a READ's reply. The connection requests the bytes after the first `done` ones of
    /// the range when it has space for them.
    Part { bytes: Vec<u8>, done: usize },
    /// More steps are needed, at once if there is time.
    More,
    /// More steps are needed, of another class for the queue.
    Queue,
}

/// Carries out a request that has neither [steps](super::steps) nor content. Blocks.
pub(super) fn perform(work: &PreparedRequest) -> Step {
    let PreparedRequest { export, writeback, request, payload, .. } = work;
    if !work.is_flushed_later {
        return short_reply(work, execute(&**export, writeback, request, payload));
    }
    let mut cached = request.clone();
    cached.command = not_durable(&request.command);
    match call(&**export, &cached, payload) {
        Ok(()) => Step::Changed,
        Err(error) => short_reply(work, writeback.judge(request, Err(error))),
    }
}

/// The end of a request whose reply has no content.
pub(super) fn short_reply(work: &PreparedRequest, result: Result<(), ExportError>) -> Step {
    let (tag, mut out) = (work.request.tag(), Vec::new());
    let outcome = Outcome::of(&result);
    match result {
        Ok(()) => work.encoder.success(tag, &mut out),
        Err(error) => work.encoder.error(tag, error.errno, &error.message, &mut out),
    }
    Step::Done(out, outcome)
}

/// As [`execute`], on the connection's thread. A panic of an export fails the request, as in the
/// pool, and not the connection.
pub(super) fn execute_in_place(
    export: &dyn Export,
    writeback: &WritebackErrors,
    request: &Request,
    payload: &[u8],
) -> Result<(), ExportError> {
    catch_unwind(AssertUnwindSafe(|| execute(export, writeback, request, payload))).unwrap_or_else(
        |_| {
            let command = request.command.command_type();
            tracing::error!(%command, "carrying out a request panicked");
            Err(ExportError::new(Errno::EIO, "the server failed"))
        },
    )
}

/// Reads on the connection's thread. After any failure, the pool reads again and reports the error.
pub(super) fn read_in_place(
    export: &dyn Export,
    offset: u64,
    buffer: &mut [u8],
    holes: Holes,
) -> TryRead {
    // The content of the buffer does not matter unless the read is complete.
    match catch_unwind(AssertUnwindSafe(|| export.try_read_at(offset, buffer, holes))) {
        Ok(Ok(result)) => result,
        Ok(Err(_)) | Err(_) => TryRead::WouldBlock,
    }
}

/// Maps a range, if that needs no waiting; otherwise the pool does it.
pub(super) fn map_in_place(
    export: &dyn Export,
    offset: u64,
    length: usize,
    holes: Holes,
    map: &mut ReadMap,
) -> Mapped {
    let attempt =
        AssertUnwindSafe(|| export.map_read(offset, length, holes, Lookup::CachedOnly, map));
    match catch_unwind(attempt) {
        Ok(Ok(Mapped::Complete)) if map.len() == length => Mapped::Complete,
        Ok(Ok(Mapped::HolesUnknown)) => Mapped::HolesUnknown,
        _ => Mapped::WouldBlock,
    }
}

/// Finds the places of the bytes of a range, if they are in files.
pub(super) fn place_in_place(
    export: &dyn Export,
    (offset, length): (u64, usize),
    holes: Holes,
) -> Option<Box<dyn PlacedRead>> {
    catch_unwind(AssertUnwindSafe(|| export.place_read(offset, length, holes))).ok()?
}

/// Finds the place of a write, if its bytes go to a file unchanged.
pub(super) fn place_write_in_place(
    export: &dyn Export,
    offset: u64,
    length: usize,
) -> Option<Box<dyn PlacedWrite>> {
    catch_unwind(AssertUnwindSafe(|| export.place_write(offset, length))).ok()?
}

/// Whether holes can be sent as holes.
pub(super) fn holes_of(encoder: ReplyEncoder, request: &Request) -> Holes {
    match request.command {
        Command::Read(Fragmentation::Allowed) if encoder.mode() != ReplyMode::Simple => Holes::Told,
        _ => Holes::AsData,
    }
}

/// Writes on the connection's thread, if that needs no waiting; `false` leaves it to the pool,
/// which also reports errors. Durable writes are always left to it.
pub(super) fn write_in_place(export: &dyn Export, request: &Request, payload: &[u8]) -> bool {
    request.command == Command::Write(Durability::Cached)
        && try_write_in_place(export, request.offset, payload)
}

/// Writes on the connection's thread what need not be durable yet; `false` as above.
pub(super) fn try_write_in_place(export: &dyn Export, offset: u64, payload: &[u8]) -> bool {
    let attempt = AssertUnwindSafe(|| export.try_write_at(offset, payload));
    !payload.is_empty() && matches!(catch_unwind(attempt), Ok(Ok(TryWrite::Complete)))
}

/// Carries out a request whose reply has no content.
fn execute(
    export: &dyn Export,
    writeback: &WritebackErrors,
    request: &Request,
    payload: &[u8],
) -> Result<(), ExportError> {
    let _sync = writeback.begin_sync(request);
    writeback.judge(request, call(export, request, payload))
}

/// One call of the export, for a request whose reply has no content.
pub(super) fn call(
    export: &dyn Export,
    request: &Request,
    payload: &[u8],
) -> Result<(), ExportError> {
    let (offset, length) = (request.offset, request.length);
    if length == 0 && request.command != Command::Flush {
        // The protocol leaves the result open; like other servers, succeed and do nothing.
        return Ok(());
    }
    match &request.command {
        Command::Write(durability) => export.write_at(offset, payload, *durability),
        Command::Flush => export.flush(),
        Command::Trim(durability) => export.trim(offset, length, *durability),
        Command::Cache => export.cache(offset, length),
        Command::WriteZeroes(mode, speed, durability) => {
            export.write_zeroes(offset, length, *mode, *speed, *durability)
        }
        Command::Read(_) | Command::BlockStatus(..) | Command::Disconnect => {
            Err(ExportError::new(Errno::EINVAL, "this request has content or no reply"))
        }
    }
}

/// Whether a request is a change that has to be durable when it is answered.
pub(super) const fn is_durable(command: &Command) -> bool {
    matches!(
        command,
        Command::Write(Durability::Fua)
            | Command::Trim(Durability::Fua)
            | Command::WriteZeroes(_, _, Durability::Fua)
    )
}

/// The same change without the need to be durable.
pub(super) fn not_durable(command: &Command) -> Command {
    with_durability(command, Durability::Cached)
}

/// The same change, which has to be durable when it is answered.
pub(super) fn durable(command: &Command) -> Command {
    with_durability(command, Durability::Fua)
}

fn with_durability(command: &Command, durability: Durability) -> Command {
    match command {
        Command::Write(_) => Command::Write(durability),
        Command::Trim(_) => Command::Trim(durability),
        Command::WriteZeroes(mode, speed, _) => Command::WriteZeroes(*mode, *speed, durability),
        other => other.clone(),
    }
}

/// Whether the export of a request can flush.
pub(super) fn can_flush(work: &PreparedRequest) -> bool {
    work.export.info().flags.contains(TransmissionFlags::SEND_FLUSH)
}

/// The reply to a BLOCK_STATUS: a chunk for each context.
pub(super) fn status_reply(
    encoder: ReplyEncoder,
    tag: RequestTag,
    answers: &[(MetaContextId, Vec<BlockDescriptor>)],
) -> Vec<u8> {
    let mut out = Vec::new();
    let Some(last) = answers.len().checked_sub(1) else {
        encoder.success(tag, &mut out);
        return out;
    };
    for (index, (id, descriptors)) in answers.iter().enumerate() {
        let position = if index == last { Position::Last } else { Position::More };
        encoder.block_status(tag, *id, descriptors, position, &mut out);
    }
    out
}
