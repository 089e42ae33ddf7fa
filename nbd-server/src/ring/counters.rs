//! Counts what rings do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The work of the rings (io_uring) of a server since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RingStatistics {
    /// Number of reads that rings have carried out completely.
    pub reads: u64,
    /// Number of such writes.
    pub writes: u64,
    /// Number of times that a thread began to poll for the ends of writes.
    pub polls: u64,
    /// Number of times that a thread yielded its core before it took results.
    pub yields: u64,
}

/// The counters of a thread: a line of the processor's cache, so that none slows another down.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    polls: AtomicU64,
    yields: AtomicU64,
}

/// The counters of all threads, and the number of the one that counts here.
#[derive(Debug, Clone)]
pub(crate) struct RingCounters {
    threads: Arc<[Counters]>,
    number: usize,
}

impl RingCounters {
    pub(crate) fn new(threads: usize) -> Self {
        let threads = (0..threads.max(1)).map(|_| Counters::default()).collect();
        Self { threads, number: 0 }
    }

    /// For another thread. Threads that follow panicked ones may share a number.
    pub(crate) fn of_thread(&self, number: usize) -> Self {
        Self { threads: Arc::clone(&self.threads), number: number % self.threads.len() }
    }

    pub(super) fn carried_out(&self, reads: usize, writes: usize) {
        self.add(|counters| &counters.reads, reads);
        self.add(|counters| &counters.writes, writes);
    }

    pub(super) fn polled(&self) {
        self.add(|counters| &counters.polls, 1);
    }

    pub(super) fn yielded(&self) {
        self.add(|counters| &counters.yields, 1);
    }

    fn add(&self, which: fn(&Counters) -> &AtomicU64, count: usize) {
        if count > 0 {
            which(&self.threads[self.number]).fetch_add(count as u64, Relaxed);
        }
    }

    /// The sums of all threads.
    pub(crate) fn statistics(&self) -> RingStatistics {
        let sum = |which: fn(&Counters) -> &AtomicU64| {
            self.threads.iter().map(|counters| which(counters).load(Relaxed)).sum()
        };
        RingStatistics {
            reads: sum(|counters| &counters.reads),
            writes: sum(|counters| &counters.writes),
            polls: sum(|counters| &counters.polls),
            yields: sum(|counters| &counters.yields),
        }
    }
}
