//! A *bucket* enforces a rate: it is the time at which the next request may begin. A request
//! advances that time by its cost. So each waiting connection has its own time, in the order of
//! arrival, and sleeps until then. A request may cost more than the rate allows per second: later
//! ones then wait longer. (The crate `governor` is not used because it refuses requests that are
//! larger than its bucket.)

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The credit of an idle bucket, in nanoseconds: the requests of this time may begin at once.
const BURST: u64 = 100_000_000;
const SECOND: u128 = 1_000_000_000;

/// A rate, and the time at which its next unit is free, in nanoseconds since the first use.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    /// Units per second; zero for no limit.
    rate: AtomicU64,
    next: AtomicU64,
    /// The number of changes of the rate.
    changes: AtomicUsize,
}

impl Bucket {
    /// Units per second; zero for no limit.
    #[inline]
    pub(super) fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    /// The number of changes of the rate.
    pub(super) fn changes(&self) -> usize {
        self.changes.load(Ordering::Relaxed)
    }

    /// Whether a unit is free at this time.
    pub(super) fn is_idle(&self, now: u64) -> bool {
        self.next.load(Ordering::Relaxed) <= now
    }

    /// Starts again with another rate.
    pub(super) fn set_rate(&self, rate: u64) {
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            self.next.store(0, Ordering::Relaxed);
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes `cost` units; returns when they are free and how long they last, in nanoseconds.
    pub(super) fn reserve(&self, cost: u64, now: impl FnOnce() -> u64) -> (u64, u64) {
        let rate = self.rate();
        if rate == 0 || cost == 0 {
            return (0, 0);
        }
        let lasts = (u128::from(cost) * SECOND).div_ceil(rate.into());
        let lasts = u64::try_from(lasts).unwrap_or(u64::MAX);
        let earliest = now().saturating_sub(BURST);
        let begins = |next: u64| next.max(earliest);
        let update = |next: u64| Some(begins(next).saturating_add(lasts));
        let before = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
        (begins(before.unwrap_or(earliest)), lasts)
    }

    /// Returns an unused reservation.
    pub(super) fn give_back(&self, lasts: u64) {
        let update = |next: u64| Some(next.saturating_sub(lasts));
        let _ = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
    }
}

/// The instant at this time; `None` if there is none.
pub(super) fn instant_of(nanoseconds: u64) -> Option<Instant> {
    epoch().checked_add(Duration::from_nanos(nanoseconds))
}

fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

/// The time since the first use.
pub(super) fn nanoseconds_now() -> u64 {
    u64::try_from(epoch().elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_keeps_its_rate_saves_up_little_and_takes_requests_of_any_size() {
        let bucket = Bucket { rate: 1000.into(), ..Bucket::default() };
        let now = 10_000_000_000;
        let begins = |cost, now| bucket.reserve(cost, || now).0;
        // A tenth of a second is saved up.
        assert_eq!(begins(100, now), now - BURST);
        assert_eq!(begins(1, now), now);
        assert_eq!(begins(10_000, now), now + 1_000_000);
        assert_eq!(begins(1, now), now + 1_000_000 + 10_000_000_000, "the large one is paid for");
        assert_eq!(begins(u64::MAX, 4 * now), 4 * now - BURST);
        assert_eq!(bucket.next.load(Ordering::Relaxed), u64::MAX, "it does not wrap around");
    }

    #[test]
    fn a_request_that_does_not_begin_is_not_paid_for() {
        let bucket = Bucket { rate: 1.into(), ..Bucket::default() };
        let now = 10_000_000_000;
        assert_eq!(bucket.reserve(1, || now).0, now - BURST);
        let (_, lasts) = bucket.reserve(1000, || now);
        bucket.give_back(lasts);
        assert_eq!(bucket.reserve(1, || now).0, now - BURST + 1_000_000_000);
    }
}
