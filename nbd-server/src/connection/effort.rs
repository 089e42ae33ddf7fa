//! Limits on the cost of handshakes.
//!
//! Most handshakes end after a few options, which are answered at once. A client that sends more
//! takes turns with the others of its thread, and pauses after each burst of options. Few
//! handshakes of a server may pause at a time, and the others wait for a turn. So a flood of
//! options from any number of connections uses a small part of one core.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::turn::{REQUEST_COST, Thread, Turn};

/// The cost of the options that are answered without a pause.
const BURST_COST: usize = 64 * REQUEST_COST;
/// The same before the first pause: enough for all clients that do not ask about many exports.
const FIRST_BURST_COST: usize = 16 * REQUEST_COST;
/// The pause after a burst, or after an option of the same cost.
const PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(64);

/// Limits the handshakes of a server that pause at the same time.
#[derive(Debug, Clone)]
pub(crate) struct Pauses(Arc<Semaphore>);

impl Pauses {
    /// Permits half of the `cores`, at least one.
    pub(crate) fn new(cores: usize) -> Self {
        Self(Arc::new(Semaphore::new((cores / 2).max(1))))
    }
}

/// The cost of one handshake.
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

    /// Adds the cost of work that was done, in bytes moved.
    pub(super) const fn spend(&mut self, cost: usize) {
        self.turn.spend(cost);
        self.burst = self.burst.saturating_add(cost);
    }

    /// Whether it is time for [`Effort::next`].
    pub(super) const fn is_over(&self) -> bool {
        self.burst >= BURST_COST
    }

    /// Records that the server waits for the client.
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

/// The pause after work of this cost, in proportion to it.
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
    async fn handshakes_pause_one_after_the_other_and_those_that_ask_for_little_go_on() {
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
