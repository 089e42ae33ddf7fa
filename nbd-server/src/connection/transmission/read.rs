//! READs that are answered where the connection stands, as far as that takes no waiting.

use std::os::fd::AsFd;

use nbd_proto::transmission::{Position, Request};

use super::super::read_steps;
use super::super::turn::Turn;
use super::replies::Replies;
use super::target::Target;
use crate::export::{Content, FileSpan, Holes, ReadMap, Segment, TryRead};
use crate::sys;

/// Reads from this size on are mapped first, and moved from the page cache to the socket without a
/// copy if they can be. In bytes. Below it the copy is cheaper than the extra system calls.
const SEND_FILE_LEN: usize = 32 * 1024;

/// What is left of a READ: the part behind the first `done` bytes may have to wait, or is a long
/// one. It is for the pool.
pub(super) struct ForPool {
    pub(super) done: usize,
}

/// The READs of a connection.
pub(super) struct PromptReads {
    /// Memory for the map of the READ that is being answered.
    map: ReadMap,
}

impl PromptReads {
    pub(super) fn new() -> Self {
        Self { map: ReadMap::new() }
    }

    /// Answers a READ from the page cache, as far as that goes.
    pub(super) fn read(
        &mut self,
        request: &Request,
        answering: &mut Answering<'_>,
    ) -> Result<(), ForPool> {
        let length = request.data_len();
        if length == 0 {
            answering.replies.answer(request, Ok(()));
            return Ok(());
        }
        // The map of a small read would cost more than the copy: what the read itself has found
        // decides.
        if length < SEND_FILE_LEN {
            let whole = (request.offset, length);
            let holes = answering.target.holes_of(request);
            match answering.copy(request, whole, Position::Last, holes) {
                TryRead::Complete => return Ok(()),
                TryRead::WouldBlock => return Err(ForPool { done: 0 }),
                TryRead::Sparse => {}
            }
        }
        self.read_on(request, 0, answering)
    }

    /// Goes on with a READ of which `done` bytes are answered.
    pub(super) fn read_on(
        &mut self,
        request: &Request,
        done: usize,
        answering: &mut Answering<'_>,
    ) -> Result<(), ForPool> {
        let holes = answering.target.holes_of(request);
        let (start, length) = (request.offset + done as u64, request.data_len() - done);
        self.map.clear();
        if !answering.target.map_now(start, length, holes, &mut self.map) {
            return Err(ForPool { done });
        }
        answering.mapped(request, done, holes, &self.map)
    }
}

/// What an answer is made of.
pub(super) struct Answering<'a> {
    pub(super) target: &'a Target,
    pub(super) replies: &'a mut Replies,
    pub(super) turn: &'a mut Turn,
}

impl Answering<'_> {
    /// Answers a READ part by part, from the first `done` bytes on, up to one for the pool.
    fn mapped(
        &mut self,
        request: &Request,
        mut done: usize,
        holes: Holes,
        map: &ReadMap,
    ) -> Result<(), ForPool> {
        if holes == Holes::AsData && map.segments().len() > 1 {
            let whole = (request.offset, map.len());
            return match self.copy(request, whole, Position::Last, holes) {
                TryRead::Complete => Ok(()),
                _ => Err(ForPool { done }),
            };
        }
        for part in map.segments() {
            if !self.segment(request, done, holes, part) {
                return Err(ForPool { done });
            }
            done += part.length;
        }
        Ok(())
    }

    /// Answers one part of a READ, behind the first `done` bytes; false if it is for the pool.
    fn segment(&mut self, request: &Request, done: usize, holes: Holes, part: &Segment) -> bool {
        let is_last = done + part.length == request.data_len();
        let position = if is_last { Position::Last } else { Position::More };
        let chunk = (request.offset + done as u64, part.length);
        match &part.content {
            Content::Zero if holes == Holes::Told => {
                self.replies.hole(request, chunk, position);
                return true;
            }
            Content::File(span) if self.send_file(request, chunk, position, span) => return true,
            _ => {}
        }
        let may_copy = !read_steps::is_long(request) || holes == Holes::AsData;
        may_copy && self.copy(request, chunk, position, Holes::AsData) == TryRead::Complete
    }

    /// Reads a part of a READ, given by its offset and length, into a reply, if that takes no
    /// waiting. Otherwise it is not in memory, or an error, or no data: nothing is answered.
    fn copy(
        &mut self,
        request: &Request,
        (offset, length): (u64, usize),
        position: Position,
        holes: Holes,
    ) -> TryRead {
        // A longer one would keep the others of its thread waiting, and its memory has to come from
        // the budget: the pool sees to both, step by step.
        if length > read_steps::STEP_LEN {
            return TryRead::WouldBlock;
        }
        let target = self.target;
        self.replies.data(request, (offset, length), position, |buffer| {
            target.read_now(offset, buffer, holes)
        })
    }

    /// Answers with a long part of a file without copying it, if all of it is in the page cache.
    /// Once the header is out an error could only close the connection.
    fn send_file(
        &mut self,
        request: &Request,
        chunk: (u64, usize),
        position: Position,
        span: &FileSpan,
    ) -> bool {
        let (_, length) = chunk;
        if length < SEND_FILE_LEN
            || !sys::is_resident(span.file.as_fd(), span.offset, length as u64)
        {
            return false;
        }
        if read_steps::is_long(request) {
            self.turn.spend(length);
        }
        self.replies.file(request, chunk, position, span);
        true
    }
}
