//! READs that are answered on the connection's thread, as far as possible without waiting.

use std::os::fd::AsFd;

use nbd_proto::transmission::{Position, Request};

use super::super::read_steps;
use super::super::turn::Turn;
use super::replies::Replies;
use super::target::Target;
use crate::export::{Content, Holes, ReadMap, Segment, TryRead};
use crate::sys::{self, Residency};

/// Reads from this size on, in bytes, are mapped first and, if possible, sent from the page cache
/// to the socket without a copy. Below it the copy is cheaper than the additional system calls.
const SEND_FILE_LEN: usize = 32 * 1024;

/// Smallest part of a reply that is copied at a time, in bytes.
const PART_LEN: usize = 64 * 1024;

/// The rest of a READ: all but the first `done` bytes.
pub(super) enum Rest {
    /// The pool reads them, because they may have to wait, or are many.
    ForPool { done: usize },
    /// They are answered in the next turn.
    NextTurn { done: usize },
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

    /// Answers a READ from the page cache, as far as possible.
    pub(super) fn read(
        &mut self,
        request: &Request,
        answering: &mut Answering<'_>,
    ) -> Result<(), Rest> {
        let length = request.data_len();
        if length == 0 {
            answering.replies.answer(request, Ok(()));
            return Ok(());
        }
        // Mapping a small read would cost more than the copy, so the read itself decides.
        if length < SEND_FILE_LEN {
            let whole = (request.offset, length);
            let holes = answering.target.holes_of(request);
            match answering.copy(request, whole, Position::Last, holes) {
                TryRead::Complete => return Ok(()),
                TryRead::WouldBlock => return Err(Rest::ForPool { done: 0 }),
                TryRead::Sparse => {}
            }
        }
        self.read_on(request, 0, answering)
    }

    /// Continues a READ after `done` answered bytes.
    pub(super) fn read_on(
        &mut self,
        request: &Request,
        done: usize,
        answering: &mut Answering<'_>,
    ) -> Result<(), Rest> {
        let holes = answering.target.holes_of(request);
        let (start, length) = (request.offset + done as u64, request.data_len() - done);
        self.map.clear();
        if !answering.target.map_now(start, length, holes, &mut self.map) {
            return Err(Rest::ForPool { done });
        }
        answering.mapped(request, done, holes, &self.map)
    }
}

/// The parts that an answer needs.
pub(super) struct Answering<'a> {
    pub(super) target: &'a Target,
    pub(super) replies: &'a mut Replies,
    pub(super) turn: &'a mut Turn,
}

impl Answering<'_> {
    /// Answers a READ part by part, after the first `done` bytes, up to a part for the pool.
    fn mapped(
        &mut self,
        request: &Request,
        mut done: usize,
        holes: Holes,
        map: &ReadMap,
    ) -> Result<(), Rest> {
        if holes == Holes::AsData && map.segments().len() > 1 {
            let whole = (request.offset, map.len());
            return match self.copy(request, whole, Position::Last, holes) {
                TryRead::Complete => Ok(()),
                _ => Err(Rest::ForPool { done }),
            };
        }
        for part in map.segments() {
            self.segment(request, done, holes, part)?;
            done += part.length;
        }
        Ok(())
    }

    /// Answers one part of a READ, after the first `done` bytes, or the beginning of that part.
    fn segment(
        &mut self,
        request: &Request,
        done: usize,
        holes: Holes,
        part: &Segment,
    ) -> Result<(), Rest> {
        let position = position_after(request, done + part.length);
        let chunk = (request.offset + done as u64, part.length);
        match &part.content {
            Content::Zero if holes == Holes::Told => {
                self.replies.hole(request, chunk, position);
                return Ok(());
            }
            Content::File(span) if part.length >= SEND_FILE_LEN => {
                let length = part.length as u64;
                match sys::residency(span.file.as_fd(), span.offset, length) {
                    Residency::Whole => {
                        self.replies.file(request, chunk, position, span);
                        return Ok(());
                    }
                    // After the header, an error could only close the connection, and the system
                    // would wait for the disk.
                    Residency::Partial => return Err(Rest::ForPool { done }),
                    Residency::Unknown => {}
                }
            }
            _ => {}
        }
        let (mut done, end) = (done, done + part.length);
        if read_steps::is_long(request) && holes == Holes::Told {
            return Err(Rest::ForPool { done });
        }
        while done < end {
            let count = match holes {
                Holes::Told => part_len(end - done, self.turn.left()),
                Holes::AsData => end - done,
            };
            if count == 0 {
                return Err(Rest::NextTurn { done });
            }
            let chunk = (request.offset + done as u64, count);
            let position = position_after(request, done + count);
            if self.copy(request, chunk, position, Holes::AsData) != TryRead::Complete {
                return Err(Rest::ForPool { done });
            }
            done += count;
        }
        Ok(())
    }

    /// Reads a part of a READ, given by its offset and length, into a reply, if that needs no
    /// waiting. Nothing is answered if the part is not in memory, is not data, or has an error.
    fn copy(
        &mut self,
        request: &Request,
        (offset, length): (u64, usize),
        position: Position,
        holes: Holes,
    ) -> TryRead {
        // A longer one would delay the other connections of the thread, and its memory has to come
        // from the budget: the pool reads it in steps.
        if length > read_steps::STEP_LEN {
            return TryRead::WouldBlock;
        }
        self.turn.spend(length);
        let target = self.target;
        self.replies.data(request, (offset, length), position, |buffer| {
            target.read_now(offset, buffer, holes)
        })
    }
}

/// The position of a chunk in the reply, after which `done` bytes of the READ are answered.
fn position_after(request: &Request, done: usize) -> Position {
    if done == request.data_len() { Position::Last } else { Position::More }
}

/// The number of `rest` bytes to copy now if the turn allows `left` more: 0 if it is over.
const fn part_len(rest: usize, left: usize) -> usize {
    if rest <= left.saturating_add(left / 2) {
        return rest;
    }
    let part = if left < PART_LEN && left > 0 { PART_LEN } else { left - left % 4096 };
    if part < rest { part } else { rest }
}
