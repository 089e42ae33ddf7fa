//! Busy polling for the ends of writes that come soon after each other.
//!
//! A thread of the system reports the ends of direct writes, a few at a time. If the thread of the
//! ring sleeps in between, it is woken for each group, and the disk has nothing to do until the
//! replies and the next requests have made their way. For reads, and for writes to stable storage,
//! polling brings little and costs CPU time.

use std::time::{Duration, Instant};

use super::counters::RingCounters;
use crate::slots::Slots;

/// The mean time between groups of results up to which a thread polls, and the limit of one wait.
const SOON: Duration = Duration::from_micros(400);
/// The mean time for each result up to which it polls: more CPU time is not spent on one.
const PRICE: Duration = Duration::from_micros(22);
/// Longer times count as this, so that a pause is forgotten after some more groups.
const GAP_MAX: Duration = Duration::from_millis(1);
/// The weight of all earlier groups against that of the last one.
const MEMORY: u32 = 7;
/// Looks for results before the core is yielded to other threads.
const LOOKS_BEFORE_YIELD: u32 = 8;

/// How the ends of writes come: how soon after each other, and how many at a time.
#[derive(Debug)]
pub(super) struct Rhythm {
    gap: Duration,
    /// A thousand times the mean number.
    writes: u32,
    last: Instant,
    is_writing: bool,
}

impl Rhythm {
    pub(super) fn new(now: Instant) -> Self {
        Self { gap: GAP_MAX, writes: 0, last: now, is_writing: false }
    }

    /// Results have come, those of so many writes among them; or none, after a look in vain.
    pub(super) fn record(&mut self, now: Instant, (results, writes): (usize, usize)) {
        if results > 0 {
            self.is_writing = writes > 0;
        }
        if writes == 0 {
            return;
        }
        let gap = now.saturating_duration_since(self.last).min(GAP_MAX);
        let writes = u32::try_from(writes).unwrap_or(u32::MAX).min(1000) * 1000;
        self.gap = (self.gap * MEMORY + gap) / (MEMORY + 1);
        self.writes = (self.writes * MEMORY + writes) / (MEMORY + 1);
        self.last = now;
    }

    /// Whether the last results were those of writes.
    pub(super) fn is_writing(&self) -> bool {
        self.is_writing
    }

    fn is_fast(&self) -> bool {
        self.is_writing && self.gap <= SOON && self.gap <= PRICE * self.writes / 1000
    }
}

/// The slots of the threads that poll; `None` if no thread may.
pub(crate) struct Polling(Option<Slots>);

impl Polling {
    /// A thread polls only while it has one of the slots.
    pub(crate) const fn new(slots: Option<Slots>) -> Self {
        Self(slots)
    }

    /// Lets the other tasks of the thread run, and the runtime look for events, again and again
    /// for a moment; returns at once if results do not come soon after each other.
    ///
    /// # Cancel safety
    ///
    /// Safe: it changes nothing.
    pub(super) async fn poll(&self, rhythm: &Rhythm, counters: &RingCounters) {
        let slots = self.0.as_ref().filter(|_| rhythm.is_fast());
        let Some(_seat) = slots.and_then(Slots::take) else { return };
        counters.polled();
        let start = Instant::now();
        while start.elapsed() < SOON {
            for _ in 0..LOOKS_BEFORE_YIELD {
                tokio::task::yield_now().await;
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a thread polls after `count` groups of so many writes, so many microseconds after
    /// each other.
    fn after(rhythm: &mut Rhythm, count: u32, (gap, writes): (u64, usize)) -> bool {
        for _ in 0..count {
            rhythm.record(rhythm.last + Duration::from_micros(gap), (writes.max(1), writes));
        }
        rhythm.is_fast()
    }

    #[test]
    fn results_that_come_soon_after_each_other_are_polled_for_until_they_come_late() {
        let mut rhythm = Rhythm::new(Instant::now());
        assert!(!rhythm.is_fast(), "nothing is known yet");
        assert!(after(&mut rhythm, 40, (300, 16)));
        assert!(after(&mut rhythm, 40, (12, 1)));
        assert!(!after(&mut rhythm, 1, (3_600_000_000, 1)), "the client rests");
        assert!(after(&mut rhythm, 40, (12, 1)), "a pause is forgotten");
        rhythm.record(rhythm.last, (0, 0));
        assert!(rhythm.is_fast(), "a look in vain says nothing");
    }

    #[test]
    fn results_with_long_pauses_or_of_reads_are_not_polled_for() {
        for rare in [(500, 32), (60, 2), (25, 1), (12, 0)] {
            let mut rhythm = Rhythm::new(Instant::now());
            after(&mut rhythm, 40, (12, 1));
            assert!(!after(&mut rhythm, 40, rare), "{rare:?}");
        }
        let mut rhythm = Rhythm::new(Instant::now());
        assert!(!after(&mut rhythm, 40, (500, usize::MAX)));
    }

    #[tokio::test]
    async fn nobody_polls_in_vain_or_without_a_slot() {
        let mut rhythm = Rhythm::new(Instant::now());
        let counters = RingCounters::new(1);
        let polling = Polling::new(Some(Slots::new(1)));
        let is_ready = |polling: &Polling, rhythm: &Rhythm| {
            let mut poll = std::pin::pin!(polling.poll(rhythm, &counters));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            poll.as_mut().poll(&mut context).is_ready()
        };
        assert!(is_ready(&polling, &rhythm), "results come seldom");
        assert!(after(&mut rhythm, 40, (12, 1)));
        assert!(!is_ready(&polling, &rhythm));
        assert!(is_ready(&Polling::new(Some(Slots::new(0))), &rhythm), "too many poll");
        assert!(is_ready(&Polling::new(None), &rhythm), "it was forbidden");
        // It ends although no result comes.
        polling.poll(&rhythm, &counters).await;
        assert_eq!(counters.statistics().polls, 2);
    }
}
