//! What a connection has taken off its receive buffer and could not answer at once.

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
use crate::ring::RingHandle;
use crate::statistics::{Outcome, Ticket};

/// No further long READ is handed to the pool while it works on so much for this connection. In
/// bytes.
const LONG_READS_LEN: usize = 4 * read_steps::STEP_LEN;

/// A request that waits for its part of the budget.
enum Waiting {
    /// A command with its payload, to be handed to the pool; of a READ this many bytes are answered.
    Pool(Request, Ticket, Vec<u8>, usize),
    /// A WRITE whose payload is to be received.
    Payload(Request),
}

/// A reply of the pool, or a part of one.
pub(super) type PooledReply = (Vec<u8>, Permit, Option<(Ticket, Outcome)>);

/// What became of the request that waited.
pub(super) enum Admitted {
    /// There is no memory for it yet.
    No,
    /// The pool has it, or there was none.
    ToPool,
    /// The payload of this WRITE may be received.
    Payload(Request, Permit),
}

/// The requests of a connection that wait for memory, for the pool, or for room for their replies.
pub(super) struct Backlog {
    waiting: Option<Waiting>,
    /// READs of which a part is answered, and which go on as soon as there is room for replies.
    unfinished: VecDeque<Unfinished>,
    pool: Pool,
    budget: BudgetQueue,
    /// What the requests in the pool may take, in bytes.
    max_bytes: usize,
}

impl Backlog {
    pub(super) fn new(established: &Established, shared: &Shared, ring: &RingHandle) -> Self {
        let (answers, max_requests) = (shared.answers.clone(), shared.config.max_requests);
        let pool =
            Pool::new(&shared.scheduler, established.entry.clone(), answers, max_requests, ring);
        Self {
            waiting: None,
            unfinished: VecDeque::new(),
            pool,
            budget: BudgetQueue::new(shared.budget.clone()),
            max_bytes: shared.config.connection_memory_limit,
        }
    }

    /// Has the reads and writes started that were handed to the ring.
    pub(super) fn start_ring(&mut self) {
        self.pool.start_ring();
    }

    /// Has the thread itself waited for the disk since this was asked last?
    pub(super) fn take_has_waited(&mut self) -> bool {
        self.pool.take_has_waited()
    }

    /// Nothing waits, and nothing is in the pool.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_none() && self.unfinished.is_empty() && !self.is_in_pool()
    }

    /// Does a request wait for memory?
    pub(super) const fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Is a request in the pool?
    pub(super) const fn is_in_pool(&self) -> bool {
        self.pool.requests() > 0
    }

    /// Has the pool as much of this connection as it may?
    pub(super) const fn is_full(&self) -> bool {
        self.pool.is_full() || (self.is_in_pool() && self.pool.bytes() >= self.max_bytes)
    }

    /// The client has said that it leaves.
    pub(super) fn say_farewell(&self) {
        self.pool.say_farewell();
    }

    /// Has it?
    pub(super) fn has_farewell(&self) -> bool {
        self.pool.has_farewell()
    }

    /// Has the pool carry out a request, as soon as there is memory for it; the first `done` bytes
    /// of a READ are answered. No other request may be waiting.
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

    /// Takes the WRITE back whose payload waits for memory.
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

    /// Hands a WRITE whose payload has memory to the pool.
    pub(super) fn submit(
        &mut self,
        target: &Target,
        (request, ticket): (Request, Ticket),
        payload: Vec<u8>,
        permit: Permit,
    ) {
        self.pool.submit(target.work(request, ticket, payload, 0), permit, Patience::Never);
    }

    /// Gives the waiting request its part of the budget, if there is one.
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

    /// The next reply of the pool. What it leaves open becomes [unfinished](Self::next_unfinished).
    /// The last part of a reply comes with what the counters need.
    pub(super) fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<PooledReply> {
        self.pool.poll_reply(cx).map(|Reply { bytes, permit, rest, answered, .. }| {
            let answered = rest.is_none().then_some(answered);
            self.unfinished.extend(rest);
            (bytes, permit, answered)
        })
    }

    /// A READ that goes on in the next turn.
    pub(super) fn put_off(&mut self, unfinished: Unfinished) {
        self.unfinished.push_front(unfinished);
    }

    /// How many requests are not answered.
    pub(super) fn len(&self) -> usize {
        self.pool.requests() + self.unfinished.len() + usize::from(self.waiting.is_some())
    }

    /// The READ that goes on next.
    pub(super) fn next_unfinished(&mut self) -> Option<Unfinished> {
        self.unfinished.pop_front()
    }
}
