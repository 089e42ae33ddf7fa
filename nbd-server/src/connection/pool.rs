//! Requests that may block, on their way through the [scheduler](crate::scheduler).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::{Context, Poll};

use nbd_proto::limits::MAX_DESCRIPTORS_SENT;
use nbd_proto::transmission::{Command, Durability, ExtentLimit, ReplyEncoder, Request};
use tokio::sync::mpsc;

use super::answer::{Answer, Farewell, Held, Reply};
use super::dispatch::{self, PreparedRequest};
use super::durability::{DurableChange, FlushWaiter};
use super::read_steps::{self, PartRead};
use super::request_job::{PooledRead, PooledWrite, RequestJob, is_heavy};
use super::ring_work;
use super::steps::{self, Progress};
use crate::budget::{Budget, Permit};
use crate::export::ExportEntry;
use crate::queue::GroupId;
use crate::ring::{RingHandle, RingLane, RingWrite};
use crate::scheduler::{Job as _, Lane, Scheduler};

/// Requests that walk over a range count as much as this part of all that a connection may have in
/// hand: a client gains nothing by more of them at a time.
const HEAVY_PART: usize = 8;

/// Descriptors of an answer for which no memory is taken.
const FREE_DESCRIPTORS: usize = 1024;

/// Memory for a descriptor, in bytes: once as it is found, once as it is sent.
const DESCRIPTOR_LEN: usize = 32;

/// Longest READ or WRITE that the connection's thread waits for, in bytes.
const MOST_WAITED_FOR: usize = 64 * 1024;

/// Whether the thread of a connection may wait for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    Waits,
    Never,
}

/// One connection's use of the pool. What waits there goes when this is dropped; but if the client
/// has said goodbye its changes are still carried out, as the protocol demands.
pub(super) struct Pool {
    /// The first field, so that it is dropped before the lanes drop the requests that wait: their
    /// answers then see that the connection has ended, and do not take it for a panic.
    replies: mpsc::UnboundedReceiver<Reply>,
    lane: Arc<Lane>,
    /// Reads and writes what it can, if there is one.
    ring: Option<RingLane>,
    /// The ring has reads or writes that are to be started.
    has_begun: bool,
    has_waited: bool,
    group: GroupId,
    entry: ExportEntry,
    answers: Budget,
    max_requests: usize,
    sender: mpsc::UnboundedSender<Reply>,
    requests: usize,
    slots: usize,
    bytes: usize,
    farewell: Farewell,
}

impl Pool {
    /// `max_requests` are allowed at a time; `answers` is memory for long answers.
    pub(super) fn new(
        scheduler: &Scheduler,
        entry: ExportEntry,
        answers: Budget,
        max_requests: usize,
        ring: &RingHandle,
    ) -> Self {
        let (sender, replies) = mpsc::unbounded_channel();
        let group = Arc::as_ptr(entry.export()).cast::<()>() as GroupId;
        let lane = Arc::new(scheduler.lane(group));
        let max_requests = max_requests.max(1);
        Self {
            replies,
            lane,
            ring: ring.lane(),
            has_begun: false,
            has_waited: false,
            group,
            entry,
            answers,
            max_requests,
            sender,
            requests: 0,
            slots: 0,
            bytes: 0,
            farewell: Farewell::default(),
        }
    }

    /// The client has said that it leaves.
    pub(super) fn say_farewell(&self) {
        self.farewell.say();
    }

    /// Has it?
    pub(super) fn has_farewell(&self) -> bool {
        self.farewell.is_said()
    }

    /// Requests that have not come back.
    pub(super) const fn requests(&self) -> usize {
        self.requests
    }

    /// Are there as many as this connection may have?
    pub(super) const fn is_full(&self) -> bool {
        self.slots >= self.max_requests
    }

    /// Bytes of their payloads and replies.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of memory that a request takes in the pool, of which the first `done` were answered.
    pub(super) fn memory_len(encoder: ReplyEncoder, request: &Request, done: usize) -> usize {
        match request.command {
            Command::Read(_) => read_steps::memory_len(encoder, request, done),
            _ => request.data_len(),
        }
    }

    /// Has `work` carried out on another thread, by the ring, or by this thread if it may wait.
    pub(super) fn submit(
        &mut self,
        mut work: PreparedRequest,
        mut permit: Permit,
        patience: Patience,
    ) {
        let slots =
            if is_heavy(&work.request) { self.max_requests.div_ceil(HEAVY_PART) } else { 1 };
        let bytes = Self::memory_len(work.encoder, &work.request, work.done);
        let held = Held { bytes, slots };
        self.requests += 1;
        self.slots += held.slots;
        self.bytes = self.bytes.saturating_add(held.bytes);
        if let Command::BlockStatus(limit, wanted) = &work.request.command {
            let contexts = wanted.as_ref().map_or(work.contexts.len(), |wanted| wanted.len());
            (work.max_descriptors, permit) =
                answer_len(&self.answers, *limit, work.request.length, contexts.max(1));
        }
        let answer = Answer {
            sender: self.sender.clone(),
            tag: work.request.tag(),
            encoder: work.encoder,
            ticket: work.ticket,
            parts: Some((permit, held)),
            farewell: is_change(&work.request).then(|| self.farewell.clone()),
        };
        if work.request.command == Command::Flush {
            let waiter = FlushWaiter::new(answer, work.writeback, work.request);
            let (scheduler, entry) = (self.lane.scheduler(), &self.entry);
            let (export, failures) = (entry.export(), entry.failures());
            entry.flushes().join(scheduler, self.group, export, failures, Box::new(waiter));
        } else {
            if work.export.is_writethrough() {
                // It may take the error of other data, and is to be told of theirs, as any change
                // that has to be durable.
                work.request.command = dispatch::durable(&work.request.command);
            }
            let progress = steps::begin(&work);
            let durable = DurableChange::begin(&work, &self.entry, self.group);
            let job = RequestJob { work, progress, durable, answer };
            let left = self.do_by_ring(job, patience).and_then(|job| self.write_in_company(job));
            if let Some(mut job) = left {
                let job_for_holes = || PartRead::for_holes(&job.work).map(Progress::Part);
                job.progress = job.progress.take().or_else(job_for_holes);
                self.lane.submit(Box::new(job));
            }
        }
    }

    /// Has the ring carry out a READ or a WRITE, if it can, or does so itself if it may wait;
    /// otherwise the job comes back.
    fn do_by_ring(&mut self, mut job: RequestJob, patience: Patience) -> Option<RequestJob> {
        let Some(ring) = self.ring.as_ref().filter(|_| job.progress.is_none()) else {
            return Some(job);
        };
        let read = ring_work::plan_read(&job.work);
        let has_company = self.requests > 1;
        let write = ring_work::plan_write(&job.work)
            .map(|placed| (job.durability_in_ring(&*placed), placed))
            .filter(|(durability, _)| job.may_use_ring(*durability, has_company));
        let is_short = job.work.request.data_len() <= MOST_WAITED_FOR;
        let is_planned = read.is_some() || write.is_some();
        // Other connections that have left may have work in the ring, which this thread ends.
        if patience == Patience::Waits && is_planned && is_short && ring.is_idle() {
            drop((read, write));
            self.has_waited = true;
            let scheduler = self.lane.scheduler();
            // It answers even if it panics.
            let rest = catch_unwind(AssertUnwindSafe(|| Box::new(job).step(scheduler)))
                .unwrap_or_default();
            rest.into_iter().for_each(|job| self.lane.submit(job));
            return None;
        }
        // What fails goes to the pool by itself.
        let lane = Arc::downgrade(&self.lane);
        if let Some(read) = read {
            ring.read(read, Box::new(PooledRead { job, lane }));
        } else if let Some((durability, placed)) = write {
            let payload = std::mem::take(&mut job.work.payload);
            let (scheduler, entry) = (self.lane.scheduler().clone(), self.entry.clone());
            let (group, since) = (self.group, job.work.writeback.count());
            let durable = durability == Durability::Fua;
            let sync = durable.then(|| entry.failures().begin_sync());
            let writer =
                PooledWrite { job, lane, scheduler, entry, group, since, durability, sync };
            ring.write(RingWrite { placed, payload, durability }, Box::new(writer));
        } else {
            return Some(job);
        }
        self.has_begun = true;
        None
    }

    /// Writes a short durable change here, if that needs no waiting and others want a flush as
    /// well, which it then waits for; otherwise the job comes back.
    fn write_in_company(&self, job: RequestJob) -> Option<RequestJob> {
        let RequestJob { work, durable, .. } = &job;
        let PreparedRequest { export, request, payload, .. } = work;
        let is_write = matches!(request.command, Command::Write(_));
        let has_company = durable.as_ref().is_some_and(DurableChange::has_company);
        let is_tried = is_write && has_company && payload.len() <= MOST_WAITED_FOR;
        if !is_tried || !dispatch::try_write_in_place(&**export, request.offset, payload) {
            return Some(job);
        }
        let RequestJob { work, durable, answer, .. } = job;
        let PreparedRequest { writeback, payload, .. } = work;
        drop(payload);
        if let Some(durable) = durable {
            durable.wait_for_flush(self.lane.scheduler(), answer, writeback);
        }
        None
    }

    /// Has the reads and writes started that the ring has begun.
    pub(super) fn start_ring(&mut self) {
        if std::mem::take(&mut self.has_begun)
            && let Some(ring) = &self.ring
        {
            ring.submit();
        }
    }

    /// Takes the memory of a reply back, for later reads of the ring.
    pub(super) fn give_back(&self, memory: Vec<u8>) {
        if let Some(ring) = &self.ring {
            ring.give_back(memory);
        }
    }

    /// Has this thread waited for the disk since this was asked last?
    pub(super) const fn take_has_waited(&mut self) -> bool {
        std::mem::replace(&mut self.has_waited, false)
    }

    /// The next reply that is ready.
    pub(super) fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Reply> {
        if self.requests == 0 {
            return Poll::Pending;
        }
        // The channel is never closed: this connection holds a sender.
        let Poll::Ready(Some(reply)) = self.replies.poll_recv(cx) else { return Poll::Pending };
        self.requests -= 1;
        self.slots = self.slots.saturating_sub(reply.held.slots);
        self.bytes = self.bytes.saturating_sub(reply.held.bytes);
        Poll::Ready(reply)
    }
}

/// Does a request change the disk, or make changes durable?
const fn is_change(request: &Request) -> bool {
    matches!(
        request.command,
        Command::Write(_) | Command::Trim(_) | Command::WriteZeroes(..) | Command::Flush
    )
}

/// How many descriptors of each of `contexts` an answer may have, and memory for them. Where there
/// is none the answer is short: the client asks for the rest.
fn answer_len(
    answers: &Budget,
    limit: ExtentLimit,
    length: u64,
    contexts: usize,
) -> (usize, Permit) {
    if limit == ExtentLimit::One {
        return (1, Permit::nothing());
    }
    // No disk has units smaller than a sector.
    let most = usize::try_from(length / 512).unwrap_or(usize::MAX).saturating_add(2);
    let most = most.min(MAX_DESCRIPTORS_SENT);
    let free = (FREE_DESCRIPTORS / contexts).max(2);
    let needed = most.saturating_mul(contexts).saturating_mul(DESCRIPTOR_LEN);
    match if most <= free { None } else { answers.try_take(needed) } {
        Some(permit) => (most, permit),
        None => (most.min(free), Permit::nothing()),
    }
}
