//! Limits on the cost of handshakes.
//!
//! Most handshakes end after a handful of options, which are answered at once. A client that sends
//! more takes turns with the others of its thread, and pauses after each burst of options. Few may
//! pause at a time in a whole server, and the others wait for that: so a flood of options, from
//! however many connections, uses a small part of one core.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::turn::{REQUEST_COST, Thread, Turn};

/// Options, as their cost, that are answered as fast as they come.
const BURST_COST: usize = 64 * REQUEST_COST;
/// The same before the first pause: more than any client needs but one that asks about many
/// exports.
const FIRST_BURST_COST: usize = 16 * REQUEST_COST;
/// The pause after a burst, and after an option that cost as much as many of them.
const PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(64);

/// How many handshakes pause at a time, in a whole server.
#[derive(Debug, Clone)]
pub(crate) struct Pauses(Arc<Semaphore>);

impl Pauses {
    /// Half of the `cores`, at least one.
    pub(crate) fn new(cores: usize) -> Self {
        Self(Arc::new(Semaphore::new((cores / 2).max(1))))
    }
}

/// The work for one handshake.
pub(super) struct Effort {
    turn: Turn,
    pauses: Pauses,
    burst: usize,
    is_lengthy: bool,
}

impl Effort {
    pub(super) fn new(thread: Thread, pauses: Pauses) -> Self {
        let burst = BURST_COST - FIRST_BURST_COST;
        Self { turn: Turn::new(thread), pauses, burst, is_lengthy: false }
    }

    /// Takes note of work that was done, in bytes moved.
    pub(super) const fn spend(&mut self, cost: usize) {
        self.turn.spend(cost);
        self.burst = self.burst.saturating_add(cost);
    }

    /// Is it time for [`Effort::next`]?
    pub(super) const fn is_over(&self) -> bool {
        self.burst >= BURST_COST
    }

    /// The client has to do something next.
    pub(super) fn rest(&mut self) {
        self.turn.rest();
    }

    /// Waits until there may be more work.
    pub(super) async fn next(&mut self) {
        self.rest();
        if self.is_over() {
            self.is_lengthy = true;
            // The semaphore is never closed.
            let _pause = self.pauses.0.acquire().await;
            tokio::time::sleep(pause_after(self.burst)).await;
            self.burst = 0;
        }
        if self.is_lengthy {
            self.turn.pass().await;
        }
    }
}

/// The pause after work of this cost: the more it was the longer.
fn pause_after(burst: usize) -> Duration {
    let bursts = u32::try_from(burst / BURST_COST).unwrap_or(u32::MAX);
    PAUSE.saturating_mul(bursts).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::{Context, Waker};

    use super::*;

    fn efforts(count: usize) -> Vec<Effort> {
        let pauses = Pauses::new(2);
        let thread = Thread::new(Arc::new(AtomicUsize::new(count)));
        (0..count).map(|_| Effort::new(thread.clone(), pauses.clone())).collect()
    }

    #[tokio::test]
    async fn a_short_handshake_never_waits() {
        let mut efforts = efforts(2);
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..FIRST_BURST_COST / REQUEST_COST - 1 {
            efforts[0].spend(REQUEST_COST);
            assert!(!efforts[0].is_over());
            assert!(Box::pin(efforts[0].next()).as_mut().poll(&mut cx).is_ready());
        }
        efforts[0].spend(REQUEST_COST);
        assert!(efforts[0].is_over());
        assert!(Box::pin(efforts[0].next()).as_mut().poll(&mut cx).is_pending());
    }

    #[tokio::test]
    async fn handshakes_pause_one_after_the_other_and_whoever_asks_for_little_goes_on() {
        let mut efforts = efforts(3);
        let [first, second, third] = &mut efforts[..] else { unreachable!() };
        first.spend(BURST_COST);
        first.next().await;
        first.spend(BURST_COST);
        second.spend(BURST_COST);
        let mut cx = Context::from_waker(Waker::noop());
        let mut pausing = Box::pin(first.next());
        assert!(pausing.as_mut().poll(&mut cx).is_pending());
        let mut waiting = Box::pin(second.next());
        assert!(waiting.as_mut().poll(&mut cx).is_pending());
        tokio::time::sleep(2 * PAUSE).await;
        // The pause is over when its task sees that, and not before.
        assert!(waiting.as_mut().poll(&mut cx).is_pending());
        third.next().await;
        pausing.await;
        first.rest();
        waiting.await;
    }

    #[test]
    fn what_costs_more_is_followed_by_a_longer_pause() {
        assert_eq!(pause_after(BURST_COST), PAUSE);
        assert_eq!(pause_after(10 * BURST_COST), 10 * PAUSE);
        assert_eq!(pause_after(usize::MAX), LONGEST_PAUSE);
    }
}
