//! A request on its way: a job of the scheduler, which a ring may carry out as well.

use std::sync::Weak;

use nbd_proto::transmission::{Command, Durability, Request};

use super::answer::Answer;
use super::dispatch::{PreparedRequest, Step, can_flush, is_durable};
use super::durability::{DurableChange, FlushWaiter};
use super::read_steps;
use super::steps::{self, Progress};
use crate::export::{ExportEntry, ExportError, OwnSync, PlacedWrite};
use crate::queue::{Class, Cost, GroupId};
use crate::reply_bytes::ReplyBytes;
use crate::ring::{FullWrite, Reader, Writer};
use crate::scheduler::{Job, Lane, Scheduler};
use crate::statistics::Outcome;

/// A request in the queue of the scheduler.
pub(super) struct RequestJob {
    pub(super) work: PreparedRequest,
    /// `None` for one without steps.
    pub(super) progress: Option<Progress>,
    pub(super) durable: Option<DurableChange>,
    pub(super) answer: Answer,
}

impl RequestJob {
    /// Whether a ring has to write to stable storage: if that is wanted, and makes the change
    /// durable.
    pub(super) fn durability_in_ring(&self, placed: &dyn PlacedWrite) -> Durability {
        let work = &self.work;
        let is_wanted = is_durable(&work.request.command) || work.export.is_writethrough();
        if is_wanted && placed.is_durable_alone() { Durability::Fua } else { Durability::Cached }
    }

    /// Whether a ring may carry out a change with this durability. If that is not all, a flush is
    /// waited for after it, which pays where others share it; a change that is alone is made
    /// durable by one call of the export.
    pub(super) fn may_use_ring(&self, durability: Durability, has_company: bool) -> bool {
        if durability == Durability::Fua {
            return true;
        }
        if self.work.export.is_writethrough() {
            return has_company && can_flush(&self.work);
        }
        let shares_flush = self.durable.as_ref().is_some_and(DurableChange::has_company);
        shares_flush || !is_durable(&self.work.request.command)
    }
}

impl Job for RequestJob {
    fn cost(&self) -> Cost {
        const MICROSECOND: u64 = 1000;
        let request = &self.work.request;
        let estimate = if is_heavy(request) {
            1000 * MICROSECOND
        } else {
            // A disk that is fast, plus the copy.
            let longest = match request.command {
                Command::Read(_) => read_steps::STEP_LEN as u64,
                _ => u64::from(u32::MAX),
            };
            100 * MICROSECOND + request.length.min(longest) / 2
        };
        Cost { class: steps::class(&self.work, self.progress.as_ref()), estimate }
    }

    fn is_abandoned(&self) -> bool {
        self.answer.is_abandoned()
    }

    fn step(mut self: Box<Self>, scheduler: &Scheduler) -> Option<Box<dyn Job>> {
        if self.is_abandoned() {
            return None;
        }
        if self.durable.as_ref().is_some_and(DurableChange::has_company) {
            self.work.is_flushed_later = true;
        }
        match steps::advance(&self.work, self.progress.as_mut()) {
            Step::More | Step::Queue => Some(self),
            Step::Done(bytes, outcome) => {
                let Self { work, progress, answer, .. } = *self;
                // Memory of a WRITE is free before the reply says so.
                drop((work, progress));
                answer.send(bytes.into(), outcome);
                None
            }
            Step::Changed => {
                let Self { work, progress, durable, answer } = *self;
                let PreparedRequest { writeback, payload, .. } = work;
                drop((payload, progress));
                if let Some(durable) = durable {
                    durable.wait_for_flush(scheduler, answer, writeback);
                }
                None
            }
            Step::Part { bytes, done } => {
                let Self { work, answer, .. } = *self;
                answer.send_part(bytes, work.request, done);
                None
            }
        }
    }
}

/// A READ that a ring carries out, or the pool after all.
pub(super) struct PooledRead {
    pub(super) job: RequestJob,
    pub(super) lane: Weak<Lane>,
}

impl Reader for PooledRead {
    fn filled(self: Box<Self>, bytes: ReplyBytes) {
        let RequestJob { work, answer, .. } = self.job;
        drop(work);
        // What the ring read is a whole reply, or the last part of one.
        answer.send(bytes, Outcome::Success);
    }

    fn failed(self: Box<Self>) {
        // Otherwise the connection has ended.
        if let Some(lane) = self.lane.upgrade() {
            lane.submit(Box::new(self.job));
        }
    }
}

/// A WRITE that a ring carries out, or the pool after all.
pub(super) struct PooledWrite {
    pub(super) job: RequestJob,
    pub(super) lane: Weak<Lane>,
    pub(super) scheduler: Scheduler,
    pub(super) entry: ExportEntry,
    pub(super) group: GroupId,
    /// The flushes that had failed before it was written.
    pub(super) since: u64,
    /// What the ring is asked for.
    pub(super) durability: Durability,
    /// For a durable one: flushes that succeed meanwhile wait for it.
    pub(super) sync: Option<OwnSync>,
}

impl Writer for PooledWrite {
    fn is_abandoned(&self) -> bool {
        self.job.is_abandoned()
    }

    fn written(self: Box<Self>, result: Result<(), ExportError>) {
        let Self { job, scheduler, entry, group, since, durability, sync: _sync, .. } = *self;
        let RequestJob { work, durable, answer, .. } = job;
        let PreparedRequest { export, writeback, request, .. } = work;
        if let Err(error) = result {
            return answer.send_short(match durability {
                Durability::Fua => Err(writeback.has_lost(error)),
                Durability::Cached => writeback.judge(&request, Err(error)),
            });
        }
        if !is_durable(&request.command) && !export.is_writethrough() {
            return answer.send_short(Ok(()));
        }
        if durability == Durability::Fua {
            return answer.send_short(writeback.judge_change(since));
        }
        // Where every change is durable a flush is shared as well.
        match durable {
            Some(durable) => durable.wait_for_flush(&scheduler, answer, writeback),
            None => {
                let waiter = FlushWaiter::of_change(answer, writeback, since);
                let (export, failures) = (entry.export(), entry.failures());
                entry.flushes().join(&scheduler, group, export, failures, Box::new(waiter));
            }
        }
    }

    fn failed(mut self: Box<Self>, payload: Vec<u8>) {
        self.job.work.payload = payload;
        match self.lane.upgrade() {
            Some(lane) => lane.submit(Box::new(self.job)),
            // The connection has ended.
            None if self.job.is_abandoned() => {}
            None => self.scheduler.submit_own(self.group, Box::new(self.job)),
        }
    }

    fn found_no_space(self: Box<Self>, write: FullWrite) {
        let (scheduler, group) = (self.scheduler.clone(), self.group);
        scheduler.submit_own(group, Box::new(FindCause { write, writer: self }));
    }
}

/// Finds out why a durable write of a ring has found no space, and answers it.
struct FindCause {
    write: FullWrite,
    writer: Box<PooledWrite>,
}

impl Job for FindCause {
    fn cost(&self) -> Cost {
        Cost { class: Class::Wait, ..self.writer.job.cost() }
    }

    fn step(self: Box<Self>, _: &Scheduler) -> Option<Box<dyn Job>> {
        let Self { write, writer } = *self;
        match write.cause() {
            Ok(error) => writer.job.answer.send_short(Err(error)),
            Err(lost) => writer.written(Err(lost)),
        }
        None
    }
}

/// Does a request walk over a range that may be the whole disk?
pub(super) const fn is_heavy(request: &Request) -> bool {
    matches!(
        request.command,
        Command::BlockStatus(..) | Command::Trim(_) | Command::WriteZeroes(..) | Command::Cache
    )
}
