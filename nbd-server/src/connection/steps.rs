//! Long requests in steps: BLOCK_STATUS, TRIM, WRITE_ZEROES, CACHE, and [READ](super::read_steps).
//!
//! A request may cover the complete disk, or transfer 32 MiB. It is carried out in steps of about a
//! millisecond. Between steps, other connections get their turn, and requests of a client that has
//! left are dropped.

use std::time::{Duration, Instant};

use nbd_proto::transmission::{Command, Request};
use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextId};

use super::dispatch::{self, PreparedRequest, Step, can_flush, is_durable, not_durable};
use super::read_steps::{self, PartRead, WholeRead};
use crate::export::{Descriptors, ExportError, MayBlock, Operation};
use crate::queue::Class;
use crate::statistics::Outcome;

/// Calls of an export are made in one step until this time has passed.
const STEP_TIME: Duration = Duration::from_millis(1);
/// Maximum number of descriptors of one call of an export.
const DESCRIPTORS_OF_CALL: usize = 1024;
/// Maximum number of calls for one context. If the calls yield little, the answer is short, which
/// is legal.
const MAX_STATUS_CALLS: u32 = 256;
/// Length of a range that an export changes in one call, in bytes, or more if the request would
/// take too many calls.
const CHANGE_LEN: u64 = 16 << 20;
const MAX_CHANGE_CALLS: u64 = 4096;
/// Durable changes up to this length, in bytes, mostly wait for the disk.
const SHORT_CHANGE_LEN: u64 = 1 << 20;

/// The progress of a request.
#[derive(Debug)]
pub(super) enum Progress {
    Status(StatusWalk),
    Change(ChangeWalk),
    Part(PartRead),
    Whole(WholeRead),
}

/// The class of the next step of a request: whether it computes or waits.
pub(super) fn class(work: &PreparedRequest, progress: Option<&Progress>) -> Class {
    match (&work.request.command, progress) {
        (Command::BlockStatus(..), _) => Class::Compute,
        (_, Some(Progress::Part(read))) => read.class(),
        (_, Some(Progress::Whole(read))) => read.class(),
        (_, Some(Progress::Change(walk))) if walk.is_flush_due => Class::Wait,
        _ => match operation_of(&work.request).map(|operation| work.export.may_block(operation)) {
            // A write that could be made in place was left to the pool because it is long.
            Some(MayBlock::Busy | MayBlock::No) => Class::Bulk,
            Some(MayBlock::Yes) | None => Class::Wait,
        },
    }
}

/// The operation of a change, for asking the export how it is carried out.
fn operation_of(request: &Request) -> Option<Operation> {
    match request.command {
        // It waits for the disk at its end.
        _ if is_durable(&request.command) && request.length <= SHORT_CHANGE_LEN => None,
        Command::Write(durability) => Some(Operation::Write(request.data_len(), durability)),
        Command::Trim(_) => Some(Operation::Trim),
        Command::WriteZeroes(..) => Some(Operation::WriteZeroes),
        Command::Cache => Some(Operation::Cache),
        _ => None,
    }
}

/// Carries out one step of a request. Blocks.
pub(super) fn advance(work: &PreparedRequest, progress: Option<&mut Progress>) -> Step {
    let Some(progress) = progress else {
        return match work.request.command {
            Command::Read(_) => read_steps::read(work),
            _ => dispatch::perform(work),
        };
    };
    let started = Instant::now();
    loop {
        let step = match progress {
            Progress::Status(walk) => walk.call(work),
            Progress::Change(walk) => walk.call(work),
            Progress::Part(read) => read.call(work),
            Progress::Whole(read) => read.call(work),
        };
        match step {
            Step::More if started.elapsed() < STEP_TIME => {}
            step => return step,
        }
    }
}

/// The first state of a request that has steps in the pool.
pub(super) fn begin(work: &PreparedRequest) -> Option<Progress> {
    let request = &work.request;
    match &request.command {
        Command::BlockStatus(_, wanted) => {
            let is_wanted =
                |id: &MetaContextId| wanted.as_ref().is_none_or(|wanted| wanted.contains(id));
            let contexts = work.contexts.iter().enumerate();
            let wanted = contexts.filter(|(_, (id, _))| is_wanted(id)).map(|(index, _)| index);
            Some(Progress::Status(StatusWalk::new(work, wanted.collect())))
        }
        Command::Trim(_) | Command::WriteZeroes(..) | Command::Cache if request.length > 0 => {
            Some(Progress::Change(ChangeWalk::new(request)))
        }
        Command::Read(_) => {
            let part = PartRead::new(work).map(Progress::Part);
            part.or_else(|| WholeRead::new(work).map(Progress::Whole))
        }
        _ => None,
    }
}

/// A BLOCK_STATUS: one context after the other, from the start of the range on.
#[derive(Debug)]
pub(super) struct StatusWalk {
    /// Indexes of the contexts that are still to be asked for, the next one last.
    wanted: Vec<usize>,
    answers: Vec<(MetaContextId, Vec<BlockDescriptor>)>,
    found: Descriptors,
    /// Where the next call begins, in bytes.
    at: u64,
    calls: u32,
}

impl StatusWalk {
    fn new(work: &PreparedRequest, mut wanted: Vec<usize>) -> Self {
        wanted.reverse();
        let found = Descriptors::new(work.max_descriptors);
        Self { wanted, answers: Vec::new(), found, at: work.request.offset, calls: 0 }
    }

    /// One call of the export. Every context is queried before the first chunk is written: an error
    /// cannot follow a chunk that ended the reply.
    fn call(&mut self, work: &PreparedRequest) -> Step {
        let request = &work.request;
        let Some((id, name)) = self.wanted.last().and_then(|index| work.contexts.get(*index))
        else {
            let reply = dispatch::status_reply(work.encoder, request.tag(), &self.answers);
            return Step::Done(reply, Outcome::Success);
        };
        let end = request.offset.saturating_add(request.length);
        // The first new one may continue the last one found, but a call for that alone is not
        // worthwhile.
        let room = work.max_descriptors.saturating_sub(self.found.len());
        let asked = room.clamp(1, DESCRIPTORS_OF_CALL);
        let called = work.export.block_status(name, self.at, end - self.at, asked);
        let error = match called {
            Ok(found) => {
                let is_over = self.take(found, end);
                if !is_over {
                    return Step::More;
                }
                let fresh = Descriptors::new(work.max_descriptors);
                let found = std::mem::replace(&mut self.found, fresh).into_vec();
                if !found.is_empty() {
                    self.answers.push((*id, found));
                    self.wanted.pop();
                    (self.at, self.calls) = (request.offset, 0);
                    return Step::More;
                }
                ExportError::new(Errno::EIO, "the export gave no status")
            }
            Err(error) => error,
        };
        let mut out = Vec::new();
        work.encoder.error(request.tag(), error.errno, &error.message, &mut out);
        Step::Done(out, Outcome::Failure)
    }

    /// Records the result of a call; true if the context is complete.
    fn take(&mut self, found: Vec<BlockDescriptor>, end: u64) -> bool {
        self.calls += 1;
        let mut is_full = found.is_empty();
        for BlockDescriptor { length, flags } in found {
            is_full = !self.found.push(length, flags);
            if is_full {
                break;
            }
            self.at = self.at.saturating_add(length);
        }
        is_full || self.found.is_full() || self.at >= end || self.calls >= MAX_STATUS_CALLS
    }
}

/// A TRIM, WRITE_ZEROES or CACHE: one part of the range after the other.
#[derive(Debug)]
pub(super) struct ChangeWalk {
    at: u64,
    end: u64,
    length: u64,
    /// Whether all parts are done, and a flush has to make them durable.
    is_flush_due: bool,
}

impl ChangeWalk {
    fn new(request: &Request) -> Self {
        let end = request.offset.saturating_add(request.length);
        let least = (request.length / MAX_CHANGE_CALLS).max(CHANGE_LEN);
        let mut length = least.checked_next_power_of_two().unwrap_or(u64::MAX);
        if is_all_or_nothing(request) {
            length = u64::MAX;
        }
        Self { at: request.offset, end, length, is_flush_due: false }
    }

    fn call(&mut self, work: &PreparedRequest) -> Step {
        let request = &work.request;
        let _sync = work.writeback.begin_sync(request);
        if self.is_flush_due {
            // One flush for all parts. If it fails, other clients' writes may be lost as well, so
            // they get EIO.
            let flushed = work.export.flush();
            let result = flushed.map_err(|error| ExportError { errno: Errno::EIO, ..error });
            return dispatch::short_reply(work, work.writeback.judge(request, result));
        }
        // Parts are aligned to clusters, and to any other unit of a disk.
        let part_end = match self.length {
            u64::MAX => self.end,
            length => (self.at / length + 1).saturating_mul(length).min(self.end),
        };
        let is_whole = self.at == request.offset && part_end == self.end;
        let mut part = request.clone();
        (part.offset, part.length) = (self.at, part_end - self.at);
        let is_short = is_whole && request.length <= SHORT_CHANGE_LEN;
        let flush_at_end = !is_short && is_durable(&request.command) && can_flush(work);
        if flush_at_end || work.is_flushed_later {
            part.command = not_durable(&request.command);
        }
        let result = dispatch::call(&*work.export, &part, &[]);
        self.at = part_end;
        if result.is_ok() && self.at < self.end {
            return Step::More;
        }
        if result.is_ok() && work.is_flushed_later {
            return Step::Changed;
        }
        if result.is_ok() && flush_at_end {
            self.is_flush_due = true;
            return Step::Queue;
        }
        dispatch::short_reply(work, work.writeback.judge(request, result))
    }
}

/// A WRITE_ZEROES that has to be fast must fail with nothing changed, which is impossible in parts,
/// unless all parts are alike: then the first one decides for all.
fn is_all_or_nothing(request: &Request) -> bool {
    use nbd_proto::transmission::Speed;
    /// The largest cluster of an image, in bytes.
    const LARGEST_CLUSTER: u64 = 2 << 20;
    let is_aligned = request.offset.is_multiple_of(LARGEST_CLUSTER)
        && request.length.is_multiple_of(LARGEST_CLUSTER);
    matches!(request.command, Command::WriteZeroes(_, Speed::FastOnly, _)) && !is_aligned
}
