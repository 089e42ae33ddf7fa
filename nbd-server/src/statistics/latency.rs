//! Latencies of requests.

use std::time::Duration;

/// Buckets: one for each power of two of 4 us, up to 16.8 s, and one for everything above.
pub(super) const BUCKETS: usize = 24;
/// The bound of the first bucket, in microseconds.
const FIRST_BOUND: u64 = 4;

/// The bucket of a latency, in nanoseconds.
pub(super) const fn bucket(nanoseconds: u64) -> usize {
    // Bounds are inclusive.
    let microseconds = nanoseconds.saturating_sub(1) / 1000;
    let index = (u64::BITS - (microseconds / FIRST_BOUND).leading_zeros()) as usize;
    if index < BUCKETS { index } else { BUCKETS - 1 }
}

/// A histogram of latencies.
///
/// The latency of a request is the time from its arrival, payload included, until its reply is
/// ready to be sent. Requests that are received together and answered without waiting count with
/// the same latency, that of the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatencyHistogram {
    pub(super) counts: [u64; BUCKETS],
    pub(super) nanoseconds: u64,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], nanoseconds: 0 }
    }
}

impl LatencyHistogram {
    /// Returns the number of requests.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Returns the sum of all latencies. It wraps after 584 years.
    #[must_use]
    pub const fn total(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds)
    }

    /// Returns the mean; `None` without requests.
    #[must_use]
    pub fn mean(&self) -> Option<Duration> {
        self.nanoseconds.checked_div(self.count()).map(Duration::from_nanos)
    }

    /// Returns the buckets in ascending order: the largest latency of a bucket (`None` for the last
    /// one, which has no bound) and its number of requests.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> + '_ {
        self.counts.iter().enumerate().map(|(index, count)| (bound(index), *count))
    }

    /// Returns the bound of the bucket that contains the `quantile` (from 0 to 1): this part of the
    /// requests took no longer. `None` without requests. The last bucket counts as 33.6 s.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let count = self.count();
        // At least the first request, at most the last.
        let rank = ((count as f64 * quantile.clamp(0.0, 1.0)).ceil() as u64).clamp(1, count.max(1));
        let mut below = 0;
        let index = self.counts.iter().position(|count| {
            below += count;
            below >= rank
        })?;
        Some(Duration::from_micros(FIRST_BOUND << index))
    }

    /// Returns the requests that were added since `earlier`, an older copy of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut result = *self;
        for (count, before) in result.counts.iter_mut().zip(earlier.counts) {
            *count = count.saturating_sub(before);
        }
        result.nanoseconds = result.nanoseconds.wrapping_sub(earlier.nanoseconds);
        result
    }

    /// Adds the requests of another histogram.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count = count.wrapping_add(more);
        }
        self.nanoseconds = self.nanoseconds.wrapping_add(other.nanoseconds);
    }
}

fn bound(index: usize) -> Option<Duration> {
    (index + 1 < BUCKETS).then(|| Duration::from_micros(FIRST_BOUND << index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(latencies: &[u64]) -> LatencyHistogram {
        let mut histogram = LatencyHistogram::default();
        for latency in latencies {
            histogram.counts[bucket(*latency)] += 1;
            histogram.nanoseconds += latency;
        }
        histogram
    }

    #[test]
    fn a_latency_is_in_the_first_bucket_whose_bound_it_does_not_exceed() {
        for nanoseconds in
            [0, 1, 3_999, 4_000, 4_001, 8_000, 8_001, 1_000_000, 16_777_216_000, 16_777_216_001]
        {
            let histogram = histogram(&[nanoseconds]);
            let latency = Duration::from_nanos(nanoseconds);
            let mut found = histogram.buckets().filter(|(_, count)| *count == 1);
            let (bound, _) = found.next().unwrap();
            let fits = histogram.buckets().map(|(bound, _)| bound);
            let first = fits
                .filter(|bound| bound.is_none_or(|bound| latency <= bound))
                .min_by_key(|bound| bound.unwrap_or(Duration::MAX));
            assert_eq!(Some(bound), first, "{nanoseconds}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_bounds_of_buckets() {
        let micro = Duration::from_micros;
        assert_eq!(LatencyHistogram::default().quantile(0.5), None);
        assert_eq!(LatencyHistogram::default().mean(), None);
        let histogram = histogram(&[1_000, 5_000, 5_000, 100_000]);
        assert_eq!(histogram.quantile(0.0), Some(micro(4)));
        assert_eq!(histogram.quantile(0.25), Some(micro(4)));
        assert_eq!(histogram.quantile(0.5), Some(micro(8)));
        assert_eq!(histogram.quantile(0.99), Some(micro(128)));
        assert_eq!(histogram.mean(), Some(Duration::from_nanos(27_750)));
    }

    #[test]
    fn what_was_added_since_a_copy_is_the_difference() {
        let (mut sum, first, second) = (histogram(&[1]), histogram(&[1]), histogram(&[9_000]));
        sum.add(&second);
        assert_eq!(sum.count(), 2);
        assert_eq!(sum.since(&first), second);
    }
}
