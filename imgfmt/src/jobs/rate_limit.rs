//! Limits the rate of jobs.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cancellation::Cancellation;
use super::error::JobError;
use crate::ordered_lock::{OrderedMutex, rank};

/// An idle limit accumulates at most this time.
const BURST: Duration = Duration::from_millis(100);
/// A cancellation is noticed within this time.
const CHECK_PERIOD: Duration = Duration::from_millis(100);

/// A limit on the data that jobs move, in bytes per second. Clones share it: several jobs with one
/// limit stay below it together.
///
/// Zeroes that need not be read do not count.
#[derive(Clone)]
pub struct RateLimit {
    bytes_per_second: NonZeroU64,
    /// The time at which more may be moved.
    next: Arc<OrderedMutex<{ rank::RATE_LIMIT }, Option<Instant>>>,
}

impl fmt::Debug for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimit")
            .field("bytes_per_second", &self.bytes_per_second)
            .finish_non_exhaustive()
    }
}

impl RateLimit {
    /// Creates a limit of which nothing is used.
    pub fn new(bytes_per_second: NonZeroU64) -> Self {
        Self { bytes_per_second, next: Arc::default() }
    }

    /// Reserves `bytes`, and returns how long to wait before they are moved.
    pub fn reserve(&self, bytes: u64) -> Duration {
        self.reserve_at(bytes, Instant::now())
    }

    fn reserve_at(&self, bytes: u64, now: Instant) -> Duration {
        let nanoseconds =
            (u128::from(bytes) * 1_000_000_000).div_ceil(self.bytes_per_second.get().into());
        let lasts = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let mut next = self.next.lock();
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let begins = next.map_or(now, |next| next.max(earliest));
        // The time overflows only if it is centuries.
        *next = Some(begins.checked_add(lasts).unwrap_or(begins));
        begins.saturating_duration_since(now)
    }

    /// Blocks until `bytes` may be transferred, or until `is_over` returns true.
    pub(super) fn wait(
        &self,
        bytes: u64,
        cancellation: &Cancellation,
        is_over: impl Fn() -> bool,
    ) -> Result<(), JobError> {
        let mut rest = self.reserve(bytes);
        while !rest.is_zero() && !is_over() {
            cancellation.check()?;
            let step = rest.min(CHECK_PERIOD);
            std::thread::sleep(step);
            rest -= step;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_waits_for_the_time_that_those_before_it_take() {
        let limit = RateLimit::new(NonZeroU64::new(1000).unwrap());
        let now = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(limit.reserve_at(1000, now), Duration::ZERO);
        assert_eq!(limit.clone().reserve_at(500, now), second, "a clone is the same limit");
        assert_eq!(limit.reserve_at(1, now + second / 2), second);
        let later = now + 60 * second;
        assert_eq!(limit.reserve_at(1000, later), Duration::ZERO);
        assert_eq!(limit.reserve_at(0, later), second - BURST, "what was idle saves up little");
    }

    #[test]
    fn no_amount_overflows() {
        let limit = RateLimit::new(NonZeroU64::MIN);
        for _ in 0..4 {
            limit.reserve(u64::MAX);
        }
    }

    #[test]
    fn a_job_that_waits_ends_when_it_is_cancelled_or_of_no_use() {
        let limit = RateLimit::new(NonZeroU64::MIN);
        let cancellation = Cancellation::new();
        limit.wait(u64::from(u32::MAX), &cancellation, || false).unwrap();
        limit.wait(1, &cancellation, || true).unwrap();
        cancellation.cancel("enough");
        let error = limit.wait(1, &cancellation, || false).unwrap_err();
        assert_eq!(error.to_string(), "enough");
    }
}
