//! The requests that a connection has received and could not answer at once.

use std::collections::VecDeque;
use std::task::{Context, Poll};

use nbd_proto::transmission::Request;

use super::super::answer::{Reply, Unfinished};
use super::super::handshake::Established;
use super::super::pool::{Patience, Pool};
use super::super::read_steps;
use super::super::shared::Shared;
use super::target::Target;
use crate::budget::{BudgetQueue, Permit};
use crate::reply_bytes::ReplyBytes;
use crate::ring::RingHandle;
use crate::statistics::{Outcome, Ticket};

/// No further long READ is handed to the pool while it works on this many bytes for this
/// connection.
const LONG_READS_LEN: usize = 4 * read_steps::STEP_LEN;

/// A request that waits for its part of the budget.
enum Waiting {
    /// A command with its payload, to be handed to the pool; for a READ, the number of answered
    /// bytes.
    Pool(Request, Ticket, Vec<u8>, usize),
    /// A WRITE whose payload is to be received.
    Payload(Request),
}

/// A reply of the pool, or a part of one.
pub(super) type PooledReply = (ReplyBytes, Permit, Option<(Ticket, Outcome)>);

/// The outcome for the waiting request.
pub(super) enum Admitted {
    /// There is no memory for it yet.
    No,
    /// The pool has it, or no request waited.
    ToPool,
    /// The payload of this WRITE may be received.
    Payload(Request, Permit),
}

/// The requests of a connection that wait for memory, for the pool, or for space for their replies.
pub(super) struct Backlog {
    waiting: Option<Waiting>,
    /// Partly answered READs, which continue when there is space for replies.
    unfinished: VecDeque<Unfinished>,
    pool: Pool,
    budget: BudgetQueue,
    /// Limit of the memory of the requests in the pool, in bytes.
    max_bytes: usize,
}

impl Backlog {
    pub(super) fn new(established: &Established, shared: &Shared, ring: &RingHandle) -> Self {
        let (answers, max_requests) = (shared.answers.clone(), shared.config.max_requests);
        let pool = Pool::new(
            &shared.scheduler,
            established.granted.entry.clone(),
            answers,
            max_requests,
            ring,
        );
        Self {
            waiting: None,
            unfinished: VecDeque::new(),
            pool,
            budget: BudgetQueue::new(shared.budget.clone()),
            max_bytes: shared.config.connection_memory_limit,
        }
    }

    /// Submits the reads and writes that were queued for the ring.
    pub(super) fn start_ring(&mut self) {
        self.pool.start_ring();
    }

    /// Takes the memory of a reply back, for later reads of the ring.
    pub(super) fn give_back(&self, memory: Vec<u8>) {
        self.pool.give_back(memory);
    }

    /// Whether this thread has waited for the disk since the last call.
    pub(super) fn take_has_waited(&mut self) -> bool {
        self.pool.take_has_waited()
    }

    /// Whether nothing waits and nothing is in the pool.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_none() && self.unfinished.is_empty() && !self.is_in_pool()
    }

    /// Whether a request waits for memory.
    pub(super) const fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Whether a request is in the pool.
    pub(super) const fn is_in_pool(&self) -> bool {
        self.pool.requests() > 0
    }

    /// Whether the pool has as much work of this connection as is permitted.
    pub(super) const fn is_full(&self) -> bool {
        self.pool.is_full() || (self.is_in_pool() && self.pool.bytes() >= self.max_bytes)
    }

    /// Records that the client has sent DISC.
    pub(super) fn say_farewell(&self) {
        self.pool.say_farewell();
    }

    /// Whether the client has sent DISC.
    pub(super) fn has_farewell(&self) -> bool {
        self.pool.has_farewell()
    }

    /// Hands a request to the pool as soon as there is memory for it; the first `done` bytes of a
    /// READ are answered already. No other request may be waiting.
    pub(super) fn leave_to_pool(
        &mut self,
        request: Request,
        ticket: Ticket,
        payload: Vec<u8>,
        done: usize,
    ) {
        debug_assert!(self.waiting.is_none(), "one request waits at a time");
        self.waiting = Some(Waiting::Pool(request, ticket, payload, done));
    }

    /// Waits for memory for the payload of a WRITE. No other request may be waiting.
    pub(super) fn wait_for_payload(&mut self, request: Request) {
        debug_assert!(self.waiting.is_none(), "one request waits at a time");
        self.waiting = Some(Waiting::Payload(request));
    }

    /// Takes back the WRITE whose payload waits for memory.
    pub(super) fn take_waiting_for_payload(&mut self) -> Option<Request> {
        match self.waiting.take() {
            Some(Waiting::Payload(request)) => {
                self.budget.give_up();
                Some(request)
            }
            other => {
                self.waiting = other;
                None
            }
        }
    }

    /// Hands a WRITE with its payload to the pool.
    pub(super) fn submit(
        &mut self,
        target: &Target,
        (request, ticket): (Request, Ticket),
        payload: Vec<u8>,
        permit: Permit,
    ) {
        self.pool.submit(target.work(request, ticket, payload, 0), permit, Patience::Never);
    }

    /// Gives the waiting request, if there is one, its part of the budget.
    pub(super) fn admit(
        &mut self,
        cx: &mut Context<'_>,
        target: &Target,
        patience: Patience,
    ) -> Admitted {
        let Some(waiting) = &self.waiting else { return Admitted::ToPool };
        let length = match waiting {
            Waiting::Pool(request, _, _, done) => {
                let is_long = read_steps::is_long(request);
                if is_long && self.is_in_pool() && self.pool.bytes() >= LONG_READS_LEN {
                    return Admitted::No;
                }
                Pool::memory_len(target.encoder(), request, *done)
            }
            Waiting::Payload(request) => request.data_len(),
        };
        let Poll::Ready(permit) = self.budget.poll_take(cx, length) else { return Admitted::No };
        match self.waiting.take() {
            Some(Waiting::Payload(request)) => Admitted::Payload(request, permit),
            Some(Waiting::Pool(request, ticket, payload, done)) => {
                self.pool.submit(target.work(request, ticket, payload, done), permit, patience);
                Admitted::ToPool
            }
            None => Admitted::ToPool,
        }
    }

    /// The next reply of the pool. The rest of a partial one becomes
    /// [unfinished](Self::next_unfinished). The last part of a reply comes with the data for the
    /// counters.
    pub(super) fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<PooledReply> {
        self.pool.poll_reply(cx).map(|Reply { bytes, permit, rest, answered, .. }| {
            let answered = rest.is_none().then_some(answered);
            self.unfinished.extend(rest);
            (bytes, permit, answered)
        })
    }

    /// Puts off a READ to the next turn.
    pub(super) fn put_off(&mut self, unfinished: Unfinished) {
        self.unfinished.push_front(unfinished);
    }

    /// The number of unanswered requests.
    pub(super) fn len(&self) -> usize {
        self.pool.requests() + self.unfinished.len() + usize::from(self.waiting.is_some())
    }

    /// The READ that continues next.
    pub(super) fn next_unfinished(&mut self) -> Option<Unfinished> {
        self.unfinished.pop_front()
    }
}
