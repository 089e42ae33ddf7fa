//! A validated request carried out, and its reply.

use std::panic::{AssertUnwindSafe, catch_unwind};

use nbd_proto::transmission::{
    Command, Durability, Fragmentation, Position, ReplyEncoder, Request, RequestTag,
};
use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextId, ReplyMode};

use super::pool::Work;
use super::witness::Witness;
use crate::export::{
    Content, Export, ExportError, Holes, Lookup, Mapped, ReadMap, TryRead, TryWrite,
};

/// When a long read fails, the part in front of the failure is found in steps of this many bytes.
const RETRY_LEN: usize = 64 * 1024;
/// ... and then of this many: the smallest unit in which disks fail today.
const SECTOR_LEN: usize = 4096;

/// Carries out a request that has no [steps](super::steps), blocking as long as it takes, and gives
/// the whole reply.
pub(super) fn perform(work: &Work) -> Vec<u8> {
    let request = &work.request;
    if let Command::Read(_) = &request.command {
        return read(&*work.export, work.encoder, request, work.done);
    }
    short_reply(work, execute(&*work.export, &work.witness, request, &work.payload))
}

/// A reply without content.
pub(super) fn short_reply(work: &Work, result: Result<(), ExportError>) -> Vec<u8> {
    let (tag, mut out) = (work.request.tag(), Vec::new());
    match result {
        Ok(()) => work.encoder.success(tag, &mut out),
        Err(error) => work.encoder.error(tag, error.errno, &error.message, &mut out),
    }
    out
}

/// As [`execute`], where the connection stands. A flaw of an export costs the request, as it does
/// in the pool, and not the connection.
pub(super) fn execute_in_place(
    export: &dyn Export,
    witness: &Witness,
    request: &Request,
    payload: &[u8],
) -> Result<(), ExportError> {
    catch_unwind(AssertUnwindSafe(|| execute(export, witness, request, payload))).unwrap_or_else(
        |_| {
            let command = request.command.command_type();
            tracing::error!(%command, "carrying out a request panicked");
            Err(ExportError::new(Errno::EIO, "the server failed"))
        },
    )
}

/// Reads where the connection stands. Whatever goes wrong is left to the pool, which reads again
/// and finds out what to say.
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

/// Finds out what a range consists of, if that takes no waiting; `false` leaves it to the pool.
pub(super) fn map_in_place(
    export: &dyn Export,
    offset: u64,
    length: usize,
    holes: Holes,
    map: &mut ReadMap,
) -> bool {
    let attempt = AssertUnwindSafe(|| export.map_read(offset, length, holes, Lookup::Prompt, map));
    matches!(catch_unwind(attempt), Ok(Ok(Mapped::Complete))) && map.len() == length
}

/// Whether holes can be sent as such.
pub(super) fn holes_of(encoder: ReplyEncoder, request: &Request) -> Holes {
    match request.command {
        Command::Read(Fragmentation::Allowed) if encoder.mode() != ReplyMode::Simple => Holes::Told,
        _ => Holes::AsData,
    }
}

/// Writes where the connection stands, if that takes no waiting; `false` leaves it to the pool,
/// which then finds out what to say. What must be durable is always left to it.
pub(super) fn write_in_place(export: &dyn Export, request: &Request, payload: &[u8]) -> bool {
    if request.command != Command::Write(Durability::Cached) || payload.is_empty() {
        return false;
    }
    let attempt = AssertUnwindSafe(|| export.try_write_at(request.offset, payload));
    matches!(catch_unwind(attempt), Ok(Ok(TryWrite::Complete)))
}

/// Carries out a request whose reply has no content.
fn execute(
    export: &dyn Export,
    witness: &Witness,
    request: &Request,
    payload: &[u8],
) -> Result<(), ExportError> {
    witness.judge(request, call(export, request, payload))
}

/// One call of the export, for a request whose reply has no content.
pub(super) fn call(
    export: &dyn Export,
    request: &Request,
    payload: &[u8],
) -> Result<(), ExportError> {
    let (offset, length) = (request.offset, request.length);
    if length == 0 && request.command != Command::Flush {
        // The protocol leaves it open; like the other servers, nothing is done and all is well.
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

/// Reads what follows the first `done` bytes of a READ, which were answered before.
fn read(export: &dyn Export, encoder: ReplyEncoder, request: &Request, done: usize) -> Vec<u8> {
    let tag = request.tag();
    let mut out = Vec::new();
    // Validation has bounded the length to the maximum payload.
    let Some(length) = usize::try_from(request.length).ok().and_then(|all| all.checked_sub(done))
    else {
        return out;
    };
    if length == 0 {
        encoder.success(tag, &mut out);
        return out;
    }
    let mut at = request.offset + done as u64;
    let map = match holes_of(encoder, request) {
        Holes::Told => map_waiting(export, at, length),
        Holes::AsData => ReadMap::of_export(length),
    };
    let headers = map.segments().len() * ReplyEncoder::MAX_READ_HEADER_LEN;
    out.reserve_exact(map.data_len() + headers);
    for (index, part) in map.segments().iter().enumerate() {
        let is_last = index + 1 == map.segments().len();
        let position = if is_last { Position::Last } else { Position::More };
        if let Content::Zero = part.content {
            encoder.hole(tag, at, part.length as u32, position, &mut out);
        } else if let Content::Bytes(bytes) = &part.content {
            encoder.data_header(tag, at, part.length as u32, position, &mut out);
            out.extend_from_slice(bytes);
        } else if let Err(error) =
            read_part(export, encoder, request, (at, part.length), position, &mut out)
        {
            end_with(error, encoder, request, &mut out);
            return out;
        }
        at += part.length as u64;
    }
    out
}

/// What a range consists of. What cannot be told shows when it is read.
fn map_waiting(export: &dyn Export, offset: u64, length: usize) -> ReadMap {
    let mut map = ReadMap::new();
    let mapped = export.map_read(offset, length, Holes::Told, Lookup::MayWait, &mut map);
    match mapped {
        Ok(Mapped::Complete) if map.len() == length => map,
        _ => ReadMap::of_export(length),
    }
}

/// Appends a chunk of data. If that fails, of as much as can be read, and the error with its place.
fn read_part(
    export: &dyn Export,
    encoder: ReplyEncoder,
    request: &Request,
    (offset, length): (u64, usize),
    position: Position,
    out: &mut Vec<u8>,
) -> Result<(), (ExportError, u64)> {
    let start = out.len();
    encoder.data_header(request.tag(), offset, length as u32, position, out);
    let data_start = out.len();
    out.resize(data_start + length, 0);
    let buffer = out.get_mut(data_start..).unwrap_or_default();
    let Err(error) = export.read_at(offset, buffer) else { return Ok(()) };
    let good = match holes_of(encoder, request) {
        Holes::Told => readable(export, offset, buffer),
        // The whole or nothing.
        Holes::AsData => 0,
    };
    out.truncate(data_start + good);
    if good > 0 {
        // A bad sector costs the client the bytes from there on, not those in front of it. The
        // header has the same length as the first one.
        let mut header = out.get_mut(start..data_start).unwrap_or_default();
        let tag = request.tag();
        encoder.data_header(tag, offset, good as u32, Position::More, &mut header);
    } else {
        out.truncate(start);
    }
    Err((error, offset + good as u64))
}

fn end_with(
    (error, at): (ExportError, u64),
    encoder: ReplyEncoder,
    request: &Request,
    out: &mut Vec<u8>,
) {
    match holes_of(encoder, request) {
        Holes::AsData => encoder.error(request.tag(), error.errno, &error.message, out),
        Holes::Told => {
            let position = Position::Last;
            encoder.error_at(request.tag(), error.errno, at, &error.message, position, out);
        }
    }
}

/// Reads again in small steps; the number of bytes in front of the first failure. At least one
/// sector at the end counts as failed, because the whole read did.
fn readable(export: &dyn Export, offset: u64, buffer: &mut [u8]) -> usize {
    let mut good = 0;
    for step in [RETRY_LEN, SECTOR_LEN] {
        // Steps end where sectors of the disk end, not where those of the request would.
        while good < buffer.len() {
            let at = offset + good as u64;
            let length = step - (at % step as u64) as usize;
            let end = buffer.len().min(good + length);
            let Some(part) = buffer.get_mut(good..end) else { break };
            if export.read_at(at, part).is_err() {
                break;
            }
            good = end;
        }
    }
    // It was readable after all: a passing fault. The reply still has to carry an error, and it is
    // for the client to try again.
    if good == buffer.len() { 0 } else { good }
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
