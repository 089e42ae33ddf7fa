//! Turns, by which the connections of a worker thread share it.
//!
//! A connection works while its client keeps it busy, but after a *quantum* others get their turn.
//! Each connection has a virtual time: the work it has done, in bytes moved. If several have work,
//! the one with the least virtual time goes first, and after a quantum the runtime polls the
//! sockets before any of them continues. A connection that was idle continues a little before the
//! present virtual time. So a client with little work waits for one or two quanta, however many
//! other clients have more, and those get equal shares of the thread.

mod order;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

pub(crate) use order::Thread;
use order::{HEAD_START, LONG_LIGHT_MEMORY, QUANTUM};

/// The work of a light connection between two idle moments, in bytes moved: one small request
/// with its header.
const LIGHT_LEN: usize = 2 * REQUEST_COST + 64;
/// Number of such periods in a row that make a connection light. A client with a few requests in
/// flight sooner or later sends two at a time, and is served best with such batches.
const LIGHT_RUNS: u8 = 16;
/// The work of a light connection is charged at 1/8 of its cost: a client that waits for each of
/// its requests is next after every quantum, even if that is more than an equal share.
const LIGHT_DISCOUNT: usize = 8;
/// The time, in bytes moved, for which a new connection counts as light in decisions about calls
/// that the system may block.
const BENEFIT_OF_DOUBT: u64 = 64 << 20;
/// Most rounds of one connection before other tasks of its thread run.
const ROUNDS_BEFORE_YIELD: u32 = 8;
/// The cost of a request or an option in addition to its bytes, in bytes moved.
pub(super) const REQUEST_COST: usize = 4096;
/// The cost of a byte received under TLS without plaintext, in bytes moved.
pub(super) const BARREN_COST: usize = 64;

/// The state of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Waits,
    Works,
}

/// One connection's place among the others of its thread.
pub(super) struct Turn {
    thread: Thread,
    id: u64,
    /// Its virtual time at the start of its present or next turn.
    time: u64,
    state: State,
    /// The work that it may do in this turn, and has done.
    quantum: usize,
    spent: usize,
    /// Number of light periods in a row, at most [`LIGHT_RUNS`].
    light_runs: u8,
    rounds: u32,
}

impl Turn {
    pub(super) fn new(thread: Thread) -> Self {
        let mut order = thread.order();
        let id = order.next_id;
        order.next_id += 1;
        order.since_light = order.since_light.min(LONG_LIGHT_MEMORY - BENEFIT_OF_DOUBT);
        drop(order);
        Self {
            thread,
            id,
            time: 0,
            state: State::Idle,
            quantum: QUANTUM,
            spent: 0,
            light_runs: LIGHT_RUNS,
            rounds: 0,
        }
    }

    /// Adds work that was done, in bytes moved.
    pub(super) const fn spend(&mut self, cost: usize) {
        self.spent = self.spent.saturating_add(cost);
    }

    /// Adds work on a part of a long payload: a client that sends one is not light, however small
    /// the parts are in which it arrives.
    pub(super) const fn spend_in_bulk(&mut self, cost: usize) {
        self.spend(cost);
        self.light_runs = 0;
    }

    /// Whether the turn is over. Never while the connection is alone on its thread.
    pub(super) fn is_over(&self) -> bool {
        self.spent >= self.quantum && !self.is_alone()
    }

    /// The work that the connection may still do, in bytes moved.
    pub(super) fn left(&self) -> usize {
        if self.is_alone() { usize::MAX } else { self.quantum.saturating_sub(self.spent) }
    }

    /// Called after each round of the connection's work: whether other tasks of the thread have to
    /// run.
    pub(super) fn ends_with_round(&mut self) -> bool {
        self.rounds = self.rounds.wrapping_add(1);
        self.is_over() || self.rounds.is_multiple_of(ROUNDS_BEFORE_YIELD)
    }

    /// Whether there are light connections on the thread, so that a call that the system may block
    /// should be made on another thread.
    pub(super) fn has_light_company(&self) -> bool {
        !self.is_alone() && self.thread.order().since_light < LONG_LIGHT_MEMORY
    }

    fn is_alone(&self) -> bool {
        self.thread.connections.load(Ordering::Relaxed) <= 1
    }

    const fn is_light(&self) -> bool {
        self.light_runs == LIGHT_RUNS
    }

    const fn key(&self) -> (u64, u64) {
        (self.time, self.id)
    }

    /// Records that the connection has no work.
    pub(super) fn rest(&mut self) {
        match self.state {
            State::Idle => self.end(),
            State::Works => {
                if self.spent > LIGHT_LEN {
                    self.light_runs = 0;
                } else if self.spent > 0 {
                    self.light_runs = LIGHT_RUNS.min(self.light_runs + 1);
                }
                self.end();
                self.thread.order().wake_next();
            }
            State::Waits => {
                self.end();
                let mut order = self.thread.order();
                order.withdraw(self.key());
                order.wake_next();
            }
        }
    }

    /// Charges the work that was done.
    fn end(&mut self) {
        if self.spent == 0 {
            self.state = State::Idle;
            return;
        }
        let spent = std::mem::take(&mut self.spent);
        self.thread.order().spend(spent);
        if self.state == State::Works {
            let charged = if self.is_light() { spent / LIGHT_DISCOUNT } else { spent };
            self.time = self.time.saturating_add(charged as u64);
        }
        self.state = State::Idle;
    }

    /// Lets others work, although there is more to do: the task is woken when [`Turn::poll`] may be
    /// ready.
    pub(super) fn pass_on(&mut self, cx: &mut Context<'_>) {
        // Light connections pass on as well, after a number of rounds.
        if self.spent > LIGHT_LEN {
            self.light_runs = 0;
        }
        self.end();
        if self.is_alone() {
            return cx.waker().wake_by_ref();
        }
        self.state = State::Waits;
        self.thread.order().wait(self.key(), cx);
    }

    /// Ready when the connection may work.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_alone = self.is_alone();
        let mut order = self.thread.order();
        let is_chosen = order.chosen == Some(self.id);
        if self.state == State::Waits {
            match &order.looker {
                Some((id, look)) if *id == self.id => {
                    if !look.is_over.load(Ordering::Relaxed) {
                        return Poll::Pending;
                    }
                    order.since_look = 0;
                }
                _ => {}
            }
            order.withdraw((self.time, self.id));
        } else {
            self.time = self.time.max(order.clock.saturating_sub(HEAD_START));
        }
        let is_contended = !is_alone && order.is_contended();
        let is_light = self.is_light();
        if is_light && is_contended {
            order.since_light = 0;
        }
        let key = (self.time, self.id);
        let is_first = order.waiting.first_key_value().is_none_or(|(first, _)| key < *first);
        let is_due = is_chosen || (is_first && (order.chosen.is_none() || is_light));
        if is_contended && (order.wants_look() || !is_due) {
            self.state = State::Waits;
            order.wait(key, cx);
            return Poll::Pending;
        }
        order.clock = order.clock.max(self.time);
        self.quantum = order.quantum();
        self.state = State::Works;
        Poll::Ready(())
    }

    /// [Passes the turn on](Self::pass_on) and waits for the next one.
    pub(super) async fn pass(&mut self) {
        let mut is_passed = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut is_passed, true) {
                return self.poll(cx);
            }
            self.pass_on(cx);
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.rest();
    }
}
