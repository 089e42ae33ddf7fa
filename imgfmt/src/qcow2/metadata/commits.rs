//! Commits in memory, and the flushes that write them to disk one after the other.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

use crate::ordered_lock::{Ordered, OrderedMutex, OrderedRwLock, rank};
use crate::qcow2::metadata::changes::Changes;

/// The commits of one image.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct Commits {
    pub(in crate::qcow2) changes: Changes,
    gate: OrderedRwLock<{ rank::GATE }, ()>,
    flush: OrderedMutex<{ rank::FLUSH }, ()>,
    /// Counts calls of flush.
    flush_calls: AtomicU64,
    flush_covers: AtomicU64,
}

/// The turn to flush. Other threads wait until it is dropped.
#[derive(Debug)]
pub(in crate::qcow2) struct FlushTurn<'a> {
    commits: &'a Commits,
    covers: u64,
    _flushing: Ordered<MutexGuard<'a, ()>>,
}

impl Commits {
    /// Held while a mapping is changed in memory, so that no flush copies half a change.
    pub(in crate::qcow2) fn enter_gate(&self) -> Ordered<RwLockReadGuard<'_, ()>> {
        self.gate.read()
    }

    /// Held while a flush takes its copy of everything: no mapping changes.
    pub(in crate::qcow2) fn close_gate(&self) -> Ordered<RwLockWriteGuard<'_, ()>> {
        self.gate.write()
    }

    /// Whether a flush has succeeded since the image was opened.
    pub(in crate::qcow2) fn has_flushed(&self) -> bool {
        self.flush_covers.load(Acquire) > 0
    }

    /// Waits for the turn to flush; `None` if a flush that began after this call has succeeded
    /// meanwhile.
    pub(in crate::qcow2) fn take_turn(&self) -> Option<FlushTurn<'_>> {
        let call = self.flush_calls.fetch_add(1, AcqRel) + 1;
        let flushing = self.flush.lock();
        if self.flush_covers.load(Acquire) >= call {
            return None;
        }
        let covers = self.flush_calls.load(Acquire);
        Some(FlushTurn { commits: self, covers, _flushing: flushing })
    }
}

impl FlushTurn<'_> {
    /// Records that everything that was committed before the turn began is on disk.
    pub(in crate::qcow2) fn has_succeeded(&self) {
        self.commits.flush_covers.store(self.covers, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_that_wait_for_a_flush_share_the_next_one() {
        let commits = Commits::default();
        let first = commits.take_turn().unwrap();
        std::thread::scope(|scope| {
            let waiting = [(); 3].map(|()| {
                scope.spawn(|| commits.take_turn().map(|turn| turn.has_succeeded()).is_some())
            });
            while commits.flush_calls.load(Acquire) < 4 {
                std::thread::yield_now();
            }
            first.has_succeeded();
            drop(first);
            // One of them flushes for all.
            let flushed = waiting.into_iter().map(|it| it.join().unwrap());
            assert_eq!(flushed.filter(|flushed| *flushed).count(), 1);
        });
    }

    #[test]
    fn a_flush_that_failed_covers_nobody() {
        let commits = Commits::default();
        drop(commits.take_turn().unwrap());
        let second = commits.take_turn().unwrap();
        second.has_succeeded();
        drop(second);
        assert!(commits.take_turn().is_some());
    }
}
