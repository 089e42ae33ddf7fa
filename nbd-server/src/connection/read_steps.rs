//! READs in the pool, in steps.
//!
//! A reply that may be split is sent in parts: a step reads as much as it has memory for, and the
//! connection continues with the rest when there is space for it. A reply that must not be split
//! (simple replies, DF) is collected in one buffer, so that a bad sector is still answered with an
//! error: after the header of such a reply, an error could only close the connection.

use nbd_proto::transmission::{Command, Position, ReplyEncoder, Request};

use super::dispatch::{self, PreparedRequest, Step};
use crate::export::{
    Content, Export, ExportError, Holes, Lookup, Mapped, ReadMap, Segment, TryRead,
};
use crate::queue::Class;
use crate::statistics::Outcome;

/// Data that is read in one step, in bytes.
pub(super) const STEP_LEN: usize = 1 << 20;

/// Size, in bytes, of the steps in which the readable part before a failure is found.
const RETRY_LEN: usize = 64 * 1024;
/// Size, in bytes, of the steps after those: the smallest unit in which current disks fail.
const SECTOR_LEN: usize = 4096;

/// Whether a READ takes several steps, if its reply may be split.
pub(super) fn is_long(request: &Request) -> bool {
    matches!(request.command, Command::Read(_)) && request.data_len() > STEP_LEN
}

/// Memory, in bytes, for the next step of a READ after `done` answered bytes.
pub(super) fn memory_len(encoder: ReplyEncoder, request: &Request, done: usize) -> usize {
    let rest = request.data_len().saturating_sub(done);
    match dispatch::holes_of(encoder, request) {
        Holes::Told => rest.min(STEP_LEN),
        Holes::AsData => rest,
    }
}

/// Reads a short reply, or the rest of one, and blocks until it is complete.
pub(super) fn read(work: &PreparedRequest) -> Step {
    let mut reader = Reader::new(work, Class::Wait);
    let read = reader.read();
    reader.finish(read)
}

/// The next part of a READ whose reply may be split, because it is long or its holes are unknown.
///
/// It is first tried without waiting, as a job that computes. Looking for holes counts as
/// computing: it takes a few microseconds if the extents of the file are in memory, and dozens of
/// threads doing it would only take the processors from the connections. A step that waits for the
/// disk has another class in the queue.
#[derive(Debug)]
pub(super) struct PartRead {
    class: Class,
}

impl PartRead {
    /// For a request of any length, if only the holes in its range are unknown.
    pub(super) fn for_holes(work: &PreparedRequest) -> Option<Self> {
        let PreparedRequest { export, encoder, request, done, .. } = work;
        if !matches!(request.command, Command::Read(_)) {
            return None;
        }
        let length = request.data_len().checked_sub(*done)?;
        let (start, holes) = (request.offset + *done as u64, dispatch::holes_of(*encoder, request));
        let mapped = dispatch::map_in_place(&**export, start, length, holes, &mut ReadMap::new());
        (mapped == Mapped::HolesUnknown).then_some(Self { class: Class::Extents })
    }

    /// For a request that is longer than a step.
    pub(super) fn new(work: &PreparedRequest) -> Option<Self> {
        let is_split = dispatch::holes_of(work.encoder, &work.request) == Holes::Told;
        let is_long = work.request.length > STEP_LEN as u64;
        (is_split && is_long).then_some(Self { class: Class::Compute })
    }

    /// The class of the step in the queue.
    pub(super) const fn class(&self) -> Class {
        self.class
    }

    /// Reads the part, or as much of it as is possible without waiting.
    pub(super) fn call(&mut self, work: &PreparedRequest) -> Step {
        let mut reader = Reader::new(work, self.class);
        let read = reader.read();
        self.class = match read {
            Err(Stop::WouldBlock) if reader.answered == 0 => Class::Wait,
            Err(Stop::HolesUnknown) => Class::Extents,
            read => return reader.finish(read),
        };
        Step::Queue
    }
}

/// The reason why a step ends.
enum Stop {
    /// The memory of this step is used up.
    Full,
    /// The rest has to wait for the disk.
    WouldBlock,
    /// The file system has to be asked for holes.
    HolesUnknown,
    /// Bytes from this offset on cannot be read.
    Failed(ExportError, u64),
}

/// One step of a READ, which makes a part of its reply.
struct Reader<'a> {
    work: &'a PreparedRequest,
    class: Class,
    /// Bytes of the request that were left when the step began.
    length: usize,
    out: Vec<u8>,
    /// The number of them that are in `out`, or are holes.
    answered: usize,
    /// Number of bytes that the step may still read.
    room: usize,
}

impl<'a> Reader<'a> {
    fn new(work: &'a PreparedRequest, class: Class) -> Self {
        // Validation has bounded the length to the maximum payload.
        let length = usize::try_from(work.request.length).unwrap_or(0).saturating_sub(work.done);
        let room = memory_len(work.encoder, &work.request, work.done);
        Self { work, class, length, out: Vec::new(), answered: 0, room }
    }

    fn read(&mut self) -> Result<(), Stop> {
        if self.length == 0 {
            self.work.encoder.success(self.work.request.tag(), &mut self.out);
            return Ok(());
        }
        let map = self.map()?;
        let headers = map.segments().len() * ReplyEncoder::MAX_READ_HEADER_LEN;
        self.out.reserve_exact(map.data_len().min(self.room) + headers);
        for part in map.segments() {
            self.push(part)?;
        }
        if self.answered < self.length { Err(Stop::Full) } else { Ok(()) }
    }

    /// Maps the rest of the range, or its first part.
    fn map(&self) -> Result<ReadMap, Stop> {
        let PreparedRequest { export, encoder, request, done, .. } = self.work;
        let start = request.offset + *done as u64;
        match (dispatch::holes_of(*encoder, request), self.class) {
            (Holes::AsData, _) => Ok(ReadMap::of_export(self.length)),
            (Holes::Told, Class::Wait | Class::Bulk | Class::Extents) => {
                Ok(map_waiting(&**export, start, self.length))
            }
            (Holes::Told, Class::Compute) => {
                let mut map = ReadMap::new();
                let holes = Holes::Told;
                match dispatch::map_in_place(&**export, start, self.length, holes, &mut map) {
                    Mapped::Complete => Ok(map),
                    Mapped::HolesUnknown => Err(Stop::HolesUnknown),
                    Mapped::Partial | Mapped::WouldBlock => Err(Stop::WouldBlock),
                }
            }
        }
    }

    fn push(&mut self, part: &Segment) -> Result<(), Stop> {
        let PreparedRequest { encoder, request, done, .. } = self.work;
        let at = request.offset + (*done + self.answered) as u64;
        let position = position(self.answered + part.length, self.length);
        match &part.content {
            Content::Zero => {
                encoder.hole(request.tag(), at, part.length as u32, position, &mut self.out);
            }
            // The bytes are in memory already.
            Content::Bytes(bytes) => {
                encoder.data_header(request.tag(), at, part.length as u32, position, &mut self.out);
                self.out.extend_from_slice(bytes);
                self.room = self.room.saturating_sub(bytes.len());
            }
            _ => return self.read_data((at, part.length)),
        }
        self.answered += part.length;
        Ok(())
    }

    /// Reads a chunk of data, as much as there is space for.
    fn read_data(&mut self, (at, wanted): (u64, usize)) -> Result<(), Stop> {
        let PreparedRequest { export, encoder, request, .. } = self.work;
        let length = wanted.min(self.room);
        if length == 0 {
            return Err(Stop::Full);
        }
        let position = position(self.answered + length, self.length);
        match self.class {
            Class::Wait | Class::Bulk => {
                let chunk = (at, length);
                read_part(&**export, *encoder, request, chunk, position, &mut self.out)
                    .map_err(|(error, at)| Stop::Failed(error, at))?;
            }
            Class::Extents | Class::Compute => {
                let start = self.out.len();
                encoder.data_header(request.tag(), at, length as u32, position, &mut self.out);
                let data_start = self.out.len();
                self.out.resize(data_start + length, 0);
                let buffer = &mut self.out[data_start..];
                let read = dispatch::read_in_place(&**export, at, buffer, Holes::AsData);
                if read != TryRead::Complete {
                    self.out.truncate(start);
                    return Err(Stop::WouldBlock);
                }
            }
        }
        self.answered += length;
        self.room -= length;
        if length < wanted { Err(Stop::Full) } else { Ok(()) }
    }

    fn finish(mut self, read: Result<(), Stop>) -> Step {
        match read {
            Ok(()) => Step::Done(self.out, Outcome::Success),
            Err(Stop::Full | Stop::WouldBlock | Stop::HolesUnknown) => {
                Step::Part { bytes: self.out, done: self.work.done + self.answered }
            }
            Err(Stop::Failed(error, at)) => {
                let PreparedRequest { encoder, request, .. } = self.work;
                end_with((error, at), *encoder, request, &mut self.out);
                Step::Done(self.out, Outcome::Failure)
            }
        }
    }
}

const fn position(answered: usize, length: usize) -> Position {
    if answered == length { Position::Last } else { Position::More }
}

/// A long READ whose reply must not be split: it is collected before it is sent.
///
/// Each step is first tried without waiting. Such a step computes and one that waits does not, so
/// they have different classes in the queue.
#[derive(Debug)]
pub(super) struct WholeRead {
    reply: Vec<u8>,
    header_len: usize,
    /// Bytes of data that were read.
    filled: usize,
    class: Class,
}

impl WholeRead {
    /// For a request whose reply cannot be sent in parts and is longer than a step.
    pub(super) fn new(work: &PreparedRequest) -> Option<Self> {
        let length = usize::try_from(work.request.length).ok()?;
        let is_whole = dispatch::holes_of(work.encoder, &work.request) == Holes::AsData;
        if !is_whole || length <= STEP_LEN {
            return None;
        }
        let mut reply = Vec::with_capacity(ReplyEncoder::MAX_READ_HEADER_LEN + length);
        let (tag, offset) = (work.request.tag(), work.request.offset);
        work.encoder.data_header(tag, offset, length as u32, Position::Last, &mut reply);
        let header_len = reply.len();
        Some(Self { reply, header_len, filled: 0, class: Class::Compute })
    }

    /// The class of the next step in the queue.
    pub(super) const fn class(&self) -> Class {
        self.class
    }

    /// Reads a step if that is possible without waiting; otherwise the next step reads it and
    /// waits.
    pub(super) fn call(&mut self, work: &PreparedRequest) -> Step {
        let length = usize::try_from(work.request.length).unwrap_or(0);
        let offset = work.request.offset + self.filled as u64;
        let start = self.reply.len();
        let count = STEP_LEN.min(length - self.filled);
        self.reply.resize(start + count, 0);
        let buffer = &mut self.reply[start..];
        let result = match self.class {
            Class::Compute => {
                if dispatch::read_in_place(&*work.export, offset, buffer, Holes::AsData)
                    != TryRead::Complete
                {
                    self.reply.truncate(start);
                    self.class = Class::Wait;
                    return Step::Queue;
                }
                Ok(())
            }
            Class::Wait | Class::Bulk | Class::Extents => work.export.read_at(offset, buffer),
        };
        if let Err(error) = result {
            // All or nothing.
            let mut out = Vec::new();
            let at = (error, work.request.offset + self.filled as u64);
            end_with(at, work.encoder, &work.request, &mut out);
            return Step::Done(out, Outcome::Failure);
        }
        self.filled += count;
        if self.filled == length {
            debug_assert_eq!(self.reply.len(), self.header_len + length, "a whole reply");
            return Step::Done(std::mem::take(&mut self.reply), Outcome::Success);
        }
        match std::mem::replace(&mut self.class, Class::Compute) {
            Class::Compute => Step::More,
            Class::Wait | Class::Bulk | Class::Extents => Step::Queue,
        }
    }
}

/// Maps a range, or its first part. Errors show when it is read.
fn map_waiting(export: &dyn Export, offset: u64, length: usize) -> ReadMap {
    let mut map = ReadMap::new();
    let mapped = export.map_read(offset, length, Holes::Told, Lookup::MayRead, &mut map);
    match mapped {
        Ok(Mapped::Complete) if map.len() == length => map,
        Ok(Mapped::Partial) if !map.is_empty() && map.len() < length => map,
        _ => ReadMap::of_export(length),
    }
}

/// Appends a chunk of data. If the read fails, appends the readable part, and returns the error
/// with its offset.
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
    let good = match dispatch::holes_of(encoder, request) {
        Holes::Told => readable(export, offset, buffer),
        // All or nothing.
        Holes::AsData => 0,
    };
    out.truncate(data_start + good);
    if good > 0 {
        // After a bad sector, the client still gets the bytes before it. The header has the same
        // length as the first one.
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
    match dispatch::holes_of(encoder, request) {
        Holes::AsData => encoder.error(request.tag(), error.errno, &error.message, out),
        Holes::Told => {
            let position = Position::Last;
            encoder.error_at(request.tag(), error.errno, at, &error.message, position, out);
        }
    }
}

/// Reads again in small steps; returns the number of bytes before the first failure. At least one
/// sector at the end counts as failed, because the complete read failed.
fn readable(export: &dyn Export, offset: u64, buffer: &mut [u8]) -> usize {
    let mut good = 0;
    for step in [RETRY_LEN, SECTOR_LEN] {
        // Steps are aligned to sectors of the disk, not to the request.
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
    // It was readable this time: a transient fault. The reply still has to contain an error, and
    // the client may try again.
    if good == buffer.len() { 0 } else { good }
}
