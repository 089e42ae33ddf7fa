//! Busy polling of the socket for a moment before the thread sleeps.
//!
//! A client with one request in flight sends the next one soon after the reply. Sleeping for so
//! short a time and being woken by another core takes longer, and costs almost as much, as polling
//! until the request has arrived. Like QEMU's `poll-max-ns`, polling has a time limit, is used only
//! while it mostly succeeds, and yields the core to other threads.

use std::time::{Duration, Instant};

use crate::slots::Slots;

/// Batches before polling is tried first.
const TRIED_AFTER: u32 = 64;
/// Limit of the same after failed attempts, each of which doubles it. A client that is always
/// slower is then polled in vain only a few times in this many requests.
const MOST_TRIED_AFTER: u32 = 64 * 1024;
/// Credit of an attempt, which ends when it is used up.
const CREDIT: u32 = 8;
/// Limit of the credit, to which each success adds one.
const MOST_CREDIT: u32 = 16;
/// The cost of a failure: polling continues if more than three in four attempts find a request.
const PRICE: u32 = 3;
/// Successes after which earlier failures are forgotten.
const FORGETS_AFTER: u32 = 256;

/// Number of attempts before the core is yielded to other threads.
const LOOKS_BEFORE_YIELD: u32 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The thread sleeps between batches.
    Off { batches: u32 },
    /// The thread polls before it sleeps.
    On { credit: u32, found: u32 },
}

/// Whether polling pays for one client.
#[derive(Debug)]
struct Habit {
    state: State,
    tried_after: u32,
}

impl Habit {
    const fn new() -> Self {
        Self { state: State::Off { batches: 0 }, tried_after: TRIED_AFTER }
    }

    /// Called after a batch: whether to poll for the next one.
    fn wants(&mut self) -> bool {
        match self.state {
            State::On { .. } => true,
            State::Off { batches } if batches < self.tried_after => {
                self.state = State::Off { batches: batches + 1 };
                false
            }
            State::Off { .. } => {
                self.state = State::On { credit: CREDIT, found: 0 };
                true
            }
        }
    }

    /// Records the result of polling.
    fn learn(&mut self, success: bool) {
        let State::On { credit, found } = self.state else { return };
        if success {
            if found >= FORGETS_AFTER {
                self.tried_after = TRIED_AFTER;
            }
            let credit = (credit + 1).min(MOST_CREDIT);
            self.state = State::On { credit, found: found.saturating_add(1) };
        } else if credit > PRICE {
            self.state = State::On { credit: credit - PRICE, found };
        } else {
            self.tried_after = self.tried_after.saturating_mul(2).min(MOST_TRIED_AFTER);
            self.state = State::Off { batches: 0 };
        }
    }
}

/// Polling of one connection.
#[derive(Debug)]
pub(super) struct Polling {
    habit: Habit,
    slots: Slots,
    longest: Duration,
}

impl Polling {
    /// Polls for at most `longest` at a time; never if that is zero.
    pub(super) const fn new(slots: Slots, longest: Duration) -> Self {
        Self { habit: Habit::new(), slots, longest }
    }

    /// Called after an answered batch: if polling pays, calls `look` until it finds something.
    /// False if nothing was found.
    pub(super) fn after_batch(&mut self, mut look: impl FnMut() -> bool) -> bool {
        if self.longest.is_zero() || !self.habit.wants() {
            return false;
        }
        let Some(_seat) = self.slots.take() else { return false };
        let start = Instant::now();
        let success = loop {
            if (0..LOOKS_BEFORE_YIELD).any(|_| look()) {
                break true;
            }
            if start.elapsed() >= self.longest {
                break false;
            }
            // The client may be waiting for this core.
            std::thread::yield_now();
        };
        self.habit.learn(success);
        success
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `batches` are polled for, if the first `in` of every `of` are found.
    fn polled(habit: &mut Habit, batches: u32, (found, of): (u32, u32)) -> u32 {
        let mut count = 0;
        for batch in 0..batches {
            if habit.wants() {
                count += 1;
                habit.learn(batch % of < found);
            }
        }
        count
    }

    #[test]
    fn a_client_that_asks_at_once_is_polled() {
        let mut habit = Habit::new();
        assert_eq!(polled(&mut habit, TRIED_AFTER, (1, 1)), 0);
        assert_eq!(polled(&mut habit, 10_000, (1, 1)), 10_000);
        assert_eq!(polled(&mut habit, 10_000, (9, 10)), 10_000, "also if it thinks now and then");
    }

    #[test]
    fn a_client_that_thinks_is_polled_ever_more_seldom() {
        let count = polled(&mut Habit::new(), 1_000_000, (0, 1));
        assert!((1..100).contains(&count), "{count}");
        let count = polled(&mut Habit::new(), 1_000_000, (1, 2));
        assert!((1..500).contains(&count), "{count}");
    }

    #[test]
    fn a_client_that_was_slow_once_is_polled_again() {
        let mut habit = Habit::new();
        polled(&mut habit, 1_000_000, (0, 1));
        polled(&mut habit, MOST_TRIED_AFTER + FORGETS_AFTER + 2, (1, 1));
        polled(&mut habit, 10, (0, 1));
        assert!(polled(&mut habit, 3 * TRIED_AFTER, (1, 1)) > 0);
    }

    #[test]
    fn zero_means_never() {
        let slots = Slots::new(1);
        let mut polling = Polling::new(slots, Duration::ZERO);
        assert!((0..1000).all(|_| !polling.after_batch(|| panic!("looked"))));
    }

    #[test]
    fn no_more_threads_poll_than_have_seats() {
        let slots = Slots::new(1);
        let mut one = Polling::new(slots.clone(), Duration::from_micros(1));
        let mut other = Polling::new(slots.clone(), Duration::from_micros(1));
        for polling in [&mut one, &mut other] {
            assert!((0..TRIED_AFTER).all(|_| !polling.after_batch(|| true)));
        }
        assert!(one.after_batch(|| !other.after_batch(|| panic!("no seat is left"))));
        assert!(other.after_batch(|| true), "the seat was given back");
    }
}
