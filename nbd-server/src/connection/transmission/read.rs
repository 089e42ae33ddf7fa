//! READs that are answered where the connection stands, as far as that takes no waiting.

use std::os::fd::AsFd;

use nbd_proto::transmission::{Command, Position, ReplyEncoder, Request};

use super::super::dispatch;
use super::super::pool::Pool;
use super::{SHORT_REPLY_LEN, Session, Waiting};
use crate::export::{Content, FileSpan, Holes, ReadMap, Segment, TryRead};
use crate::sys;

/// Reads from this size on are mapped first, and moved from the page cache to the socket without a
/// copy if they can be. In bytes. Below it the copy is cheaper than the extra system calls.
const SEND_FILE_LEN: usize = 32 * 1024;

/// Longest READ that is copied where the connection stands, in bytes. A longer one would keep the
/// others of its thread waiting, and its memory has to come from the budget: the pool sees to both,
/// step by step.
const PROMPT_READ_LEN: usize = 1 << 20;

/// The next part of a READ may have to wait, or is a long one: it is for the pool.
struct ForPool;

impl Session {
    /// Answers a READ from the page cache, or has the pool read it.
    pub(super) fn read(&mut self, request: Request) {
        let length = Pool::weight(&request);
        if length == 0 {
            let (encoder, tag) = (self.encoder, request.tag());
            return self.output.encode(SHORT_REPLY_LEN, |out| encoder.success(tag, out));
        }
        let holes = dispatch::holes_of(self.encoder, &request);
        // The map of a small read would cost more than the copy: what the read itself has found
        // decides.
        if length < SEND_FILE_LEN {
            let whole = (request.offset, length);
            match self.read_chunk(&request, whole, Position::Last, holes) {
                TryRead::Complete => return,
                TryRead::WouldBlock => return self.leave_to_pool(request, 0),
                TryRead::Sparse => {}
            }
        }
        self.read_on(request, 0);
    }

    /// Whether a READ is answered in several steps, if its reply may be split.
    pub(super) fn is_long_read(request: &Request) -> bool {
        matches!(request.command, Command::Read(_)) && Pool::weight(request) > PROMPT_READ_LEN
    }

    /// Goes on with a READ of which `done` bytes are answered.
    pub(super) fn read_on(&mut self, request: Request, done: usize) {
        let length = Pool::weight(&request);
        let holes = dispatch::holes_of(self.encoder, &request);
        let start = request.offset + done as u64;
        let mut map = std::mem::take(&mut self.map);
        map.clear();
        let is_mapped =
            dispatch::map_in_place(&*self.export, start, length - done, holes, &mut map);
        let mut done = done;
        let read = match is_mapped {
            true => self.read_mapped(&request, &mut done, holes, &map),
            false => Err(ForPool),
        };
        self.map = map;
        if let Err(ForPool) = read {
            self.leave_to_pool(request, done);
        }
    }

    /// The pool finds out what to say of what follows the first `done` bytes.
    fn leave_to_pool(&mut self, request: Request, done: usize) {
        self.waiting = Some(Waiting::Pool(request, Vec::new(), done));
    }

    /// Answers a READ part by part, from the first `done` bytes on, up to one for the pool; `done`
    /// says how far that is.
    fn read_mapped(
        &mut self,
        request: &Request,
        done: &mut usize,
        holes: Holes,
        map: &ReadMap,
    ) -> Result<(), ForPool> {
        if holes == Holes::AsData && map.segments().len() > 1 {
            let whole = (request.offset, map.len());
            let read = self.read_chunk(request, whole, Position::Last, holes);
            return if read == TryRead::Complete { Ok(()) } else { Err(ForPool) };
        }
        for part in map.segments() {
            self.read_segment(request, done, holes, part)?;
        }
        Ok(())
    }

    fn read_segment(
        &mut self,
        request: &Request,
        done: &mut usize,
        holes: Holes,
        part: &Segment,
    ) -> Result<(), ForPool> {
        let length = Pool::weight(request);
        let end = *done + part.length;
        let position = |end: usize| if end == length { Position::Last } else { Position::More };
        let chunk = (request.offset + *done as u64, part.length);
        let is_answered = match &part.content {
            Content::Zero if holes == Holes::Told => {
                self.hole(request, chunk, position(end));
                true
            }
            Content::File(span) => self.send_file(request, chunk, position(end), span),
            _ => false,
        };
        if !is_answered {
            let is_copied = !Self::is_long_read(request) || holes == Holes::AsData;
            let read = match is_copied {
                true => self.read_chunk(request, chunk, position(end), Holes::AsData),
                false => TryRead::WouldBlock,
            };
            if read != TryRead::Complete {
                return Err(ForPool);
            }
        }
        *done = end;
        Ok(())
    }

    /// Reads a part of a READ, given by its offset and length, into the send queue, if that takes
    /// no waiting.
    fn read_chunk(
        &mut self,
        request: &Request,
        (offset, length): (u64, usize),
        position: Position,
        holes: Holes,
    ) -> TryRead {
        if length > PROMPT_READ_LEN {
            return TryRead::WouldBlock;
        }
        let space = self.output.space(ReplyEncoder::MAX_READ_HEADER_LEN + length);
        let mut header = &mut space[..ReplyEncoder::MAX_READ_HEADER_LEN];
        self.encoder.data_header(request.tag(), offset, length as u32, position, &mut header);
        let header_len = ReplyEncoder::MAX_READ_HEADER_LEN - header.len();
        let data = &mut space[header_len..header_len + length];
        let read = dispatch::read_in_place(&*self.export, offset, data, holes);
        // Otherwise it is not in memory, or an error, or no data: nothing is queued.
        self.output.commit(if read == TryRead::Complete { header_len + length } else { 0 });
        read
    }

    fn hole(&mut self, request: &Request, (offset, length): (u64, usize), position: Position) {
        let (encoder, tag) = (self.encoder, request.tag());
        self.output.encode(ReplyEncoder::MAX_READ_HEADER_LEN, |out| {
            encoder.hole(tag, offset, length as u32, position, out);
        });
    }

    /// Queues a long part of a READ without copying it, if all of it is in the page cache. Once the
    /// header is out an error could only close the connection.
    fn send_file(
        &mut self,
        request: &Request,
        (offset, length): (u64, usize),
        position: Position,
        span: &FileSpan,
    ) -> bool {
        if length < SEND_FILE_LEN
            || !sys::is_resident(span.file.as_fd(), span.offset, length as u64)
        {
            return false;
        }
        if Self::is_long_read(request) {
            self.turn.spend(length);
        }
        let (encoder, tag) = (self.encoder, request.tag());
        self.output.encode(ReplyEncoder::MAX_READ_HEADER_LEN, |out| {
            encoder.data_header(tag, offset, length as u32, position, out);
        });
        self.output.push_file(span.clone(), length);
        true
    }
}
