//! The counters of one connection.

use std::sync::atomic::{AtomicU64, Ordering};

use super::activity::{Activity, LiveActivity};
use super::cell::add;
use super::latency::{BUCKETS, bucket};
use super::requests::{RequestKind, RequestStatistics};

/// Whether a request succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Success,
    Failure,
}

impl Outcome {
    pub(crate) const fn of<T, E>(result: &Result<T, E>) -> Self {
        if result.is_ok() { Self::Success } else { Self::Failure }
    }
}

#[derive(Debug, Default)]
struct CommandCounters {
    bytes: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    latencies: [AtomicU64; BUCKETS],
}

/// Any thread may read the counters; only one task at a time changes them.
#[derive(Debug)]
pub(crate) struct Counters {
    commands: [CommandCounters; RequestKind::ALL.len()],
    activity: LiveActivity,
    /// Requests that wait for a disk.
    in_flight: AtomicU64,
}

impl Counters {
    /// For a disk of `size` bytes.
    pub(crate) fn new(size: u64) -> Self {
        let commands = Default::default();
        Self { commands, activity: LiveActivity::new(size), in_flight: AtomicU64::new(0) }
    }

    pub(crate) fn requests(&self) -> RequestStatistics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut requests = RequestStatistics::default();
        for (command, counters) in requests.commands.iter_mut().zip(&self.commands) {
            command.bytes = load(&counters.bytes);
            command.errors = load(&counters.errors);
            command.latency.nanoseconds = load(&counters.nanoseconds);
            command.latency.counts = std::array::from_fn(|index| load(&counters.latencies[index]));
        }
        requests
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a request. Called by one thread at a time, like the following methods.
    pub(super) fn count(&self, kind: RequestKind, length: u64, outcome: Outcome) {
        let counters = &self.commands[kind.index()];
        match outcome {
            // Clients may send a range with FLUSH, which has no meaning.
            Outcome::Success if kind == RequestKind::Flush => {}
            Outcome::Success => add(&counters.bytes, length),
            Outcome::Failure => add(&counters.errors, 1),
        }
    }

    /// Records the latency of some requests, in nanoseconds.
    pub(super) fn time(&self, kind: RequestKind, count: u64, latency: u64) {
        let counters = &self.commands[kind.index()];
        add(&counters.latencies[bucket(latency)], count);
        add(&counters.nanoseconds, latency.saturating_mul(count));
    }

    /// Records the range of a request, in bytes.
    pub(super) fn note(&self, kind: RequestKind, offset: u64, length: u64) {
        self.activity.note(kind, offset, length);
    }

    pub(super) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(count as u64, Ordering::Relaxed);
    }

    pub(super) fn activity(&self) -> Activity {
        self.activity.snapshot()
    }
}
