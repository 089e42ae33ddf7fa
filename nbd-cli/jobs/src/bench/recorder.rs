//! Counts and latencies, by kind of request.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::options::RequestKind;

/// Significant digits of latencies.
const DIGITS: u8 = 3;

/// The requests of a connection, or of all.
#[derive(Clone, Debug, Default)]
pub(super) struct Recorder {
    kinds: [Option<Kind>; RequestKind::ALL.len()],
}

/// The requests of one kind.
#[derive(Clone, Debug)]
pub(super) struct Kind {
    pub(super) requests: u64,
    pub(super) bytes: u64,
    /// In nanoseconds.
    pub(super) latencies: Histogram<u64>,
}

impl Recorder {
    /// Counts a request.
    pub(super) fn record(&mut self, kind: RequestKind, bytes: u64, latency: Duration) {
        let Some(place) = self.kinds.get_mut(kind as usize) else { return };
        let Some(kind) = place.as_mut() else {
            *place = Kind::new();
            if place.is_some() {
                self.record(kind, bytes, latency);
            }
            return;
        };
        kind.requests += 1;
        kind.bytes += bytes;
        // It grows as it needs to.
        let _ = kind.latencies.record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds the counts of another recorder.
    pub(super) fn add(&mut self, other: &Self) {
        for (place, other) in self.kinds.iter_mut().zip(&other.kinds) {
            let Some(other) = other else { continue };
            match place {
                None => *place = Some(other.clone()),
                Some(kind) => {
                    kind.requests += other.requests;
                    kind.bytes += other.bytes;
                    // Both grow as they need to.
                    let _ = kind.latencies.add(&other.latencies);
                }
            }
        }
    }

    /// Clears the counts, and keeps the memory.
    pub(super) fn clear(&mut self) {
        for kind in self.kinds.iter_mut().flatten() {
            kind.requests = 0;
            kind.bytes = 0;
            kind.latencies.reset();
        }
    }

    /// Returns the results of this kind of requests, if there were any.
    pub(super) fn kind(&self, kind: RequestKind) -> Option<&Kind> {
        self.kinds.get(kind as usize)?.as_ref().filter(|kind| kind.requests > 0)
    }

    /// Number of requests, flushes included, and of bytes.
    pub(super) fn totals(&self) -> (u64, u64) {
        let kinds = self.kinds.iter().flatten();
        kinds.fold((0, 0), |(requests, bytes), kind| (requests + kind.requests, bytes + kind.bytes))
    }

    /// The latencies of all requests together.
    pub(super) fn latencies(&self) -> Option<Histogram<u64>> {
        let mut kinds = self.kinds.iter().flatten().filter(|kind| kind.requests > 0);
        let mut all = kinds.next()?.latencies.clone();
        for kind in kinds {
            let _ = all.add(&kind.latencies);
        }
        Some(all)
    }
}

impl Kind {
    fn new() -> Option<Self> {
        let mut latencies = Histogram::new(DIGITS).ok()?;
        latencies.auto(true);
        Some(Self { requests: 0, bytes: 0, latencies })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_counted_apart_and_added_up() {
        let mut recorder = Recorder::default();
        assert_eq!(recorder.totals(), (0, 0));
        for microseconds in 1..=1000 {
            recorder.record(RequestKind::Read, 4096, Duration::from_micros(microseconds));
        }
        recorder.record(RequestKind::Flush, 0, Duration::from_secs(7200));
        let mut sum = recorder.clone();
        sum.add(&recorder);
        assert_eq!(sum.totals(), (2002, 2000 * 4096));
        let reads = sum.kind(RequestKind::Read).expect("reads");
        let median = reads.latencies.value_at_quantile(0.5);
        assert!((499_000..=502_000).contains(&median), "{median}");
        let flushes = sum.kind(RequestKind::Flush).expect("flushes");
        let longest = flushes.latencies.max();
        assert!((7_190..7_210).contains(&(longest / 1_000_000_000)), "two hours fit: {longest}");
        assert_eq!(sum.latencies().expect("some").len(), 2002);
        sum.clear();
        assert!(sum.kind(RequestKind::Read).is_none() && sum.latencies().is_none());
        sum.add(&recorder);
        assert_eq!(sum.totals().0, 1001);
    }
}
