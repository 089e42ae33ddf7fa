//! Locks on ranges of a file, which prevent other changes of a block while it is read, changed and
//! written back.

use std::ops::Range;
use std::sync::{Arc, Condvar};

use crate::ordered_lock::{OrderedMutex, rank};

/// With more locks than this, attempts without waiting fail.
const MAX_SHARED: usize = 1024;

/// Locks on ranges. A thread that holds one must not wait for another.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    state: OrderedMutex<{ rank::FILE_RANGES }, State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Holders of locks and waiters, in the order of their arrival. An entry waits for conflicting
    /// ones before it, so no thread waits forever.
    entries: Vec<Entry>,
    next_id: u64,
    waiting: usize,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    range: Range<u64>,
    mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Shared,
    Exclusive,
}

impl Entry {
    fn conflicts(&self, other: &Self) -> bool {
        let is_exclusive = self.mode == Mode::Exclusive || other.mode == Mode::Exclusive;
        is_exclusive && self.range.start < other.range.end && other.range.start < self.range.end
    }
}

impl State {
    /// Appends an entry; returns its number.
    fn push(&mut self, range: Range<u64>, mode: Mode) -> u64 {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.entries.push(Entry { id, range, mode });
        id
    }

    fn is_blocked(&self, id: u64) -> bool {
        let Some(place) = self.entries.iter().position(|entry| entry.id == id) else {
            return false;
        };
        let (before, from) = self.entries.split_at(place);
        from.first().is_some_and(|entry| before.iter().any(|other| other.conflicts(entry)))
    }
}

/// A lock that is held until this is dropped.
#[derive(Debug)]
pub(crate) struct RangeGuard {
    locks: Arc<RangeLocks>,
    id: u64,
}

impl RangeLocks {
    /// Waits until no exclusive lock is held on a part of `range`.
    pub(crate) fn shared(self: &Arc<Self>, range: Range<u64>) -> RangeGuard {
        self.lock(range, Mode::Shared)
    }

    /// As [`shared`](Self::shared), without waiting; `None` if an exclusive lock is held or waited
    /// for, or if there are so many locks that a search takes long.
    pub(crate) fn try_shared(self: &Arc<Self>, range: Range<u64>) -> Option<RangeGuard> {
        let mut state = self.state.lock();
        if state.entries.len() >= MAX_SHARED {
            return None;
        }
        let id = state.push(range, Mode::Shared);
        if state.is_blocked(id) {
            state.entries.pop();
            return None;
        }
        Some(RangeGuard { locks: Arc::clone(self), id })
    }

    /// Waits until no lock is held on a part of `range`.
    pub(crate) fn exclusive(self: &Arc<Self>, range: Range<u64>) -> RangeGuard {
        self.lock(range, Mode::Exclusive)
    }

    fn lock(self: &Arc<Self>, range: Range<u64>, mode: Mode) -> RangeGuard {
        let mut state = self.state.lock();
        let id = state.push(range, mode);
        while state.is_blocked(id) {
            state.waiting += 1;
            state = state.wait(&self.freed);
            state.waiting -= 1;
        }
        drop(state);
        RangeGuard { locks: Arc::clone(self), id }
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut state = self.locks.state.lock();
        state.entries.retain(|entry| entry.id != self.id);
        if state.waiting > 0 {
            self.locks.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::thread;

    use super::*;

    #[test]
    fn shared_locks_and_locks_of_other_ranges_do_not_wait() {
        let locks = Arc::new(RangeLocks::default());
        let _one = locks.shared(0..10);
        let _two = locks.shared(5..15);
        let _three = locks.exclusive(15..20);
        let _four = locks.try_shared(10..15).unwrap();
        assert!(locks.try_shared(14..16).is_none(), "it would have to wait");
        assert_eq!(locks.state.lock().entries.len(), 4, "who was refused leaves nothing");
    }

    #[test]
    fn locks_that_are_not_waited_for_are_bounded() {
        let locks = Arc::new(RangeLocks::default());
        let mut held: Vec<_> = (0..MAX_SHARED).map_while(|_| locks.try_shared(0..10)).collect();
        assert_eq!(held.len(), MAX_SHARED);
        assert!(locks.try_shared(0..10).is_none());
        held.pop();
        assert!(locks.try_shared(0..10).is_some());
    }

    #[test]
    fn an_exclusive_lock_waits_for_shared_ones_and_is_not_overtaken() {
        let locks = Arc::new(RangeLocks::default());
        let (is_held, was_overtaken) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = locks.shared(0..10);
        thread::scope(|scope| {
            scope.spawn(|| {
                let _held = locks.exclusive(9..12);
                is_held.store(true, SeqCst);
            });
            while locks.state.lock().waiting < 1 {
                thread::yield_now();
            }
            scope.spawn(|| {
                let _held = locks.shared(11..13);
                was_overtaken.store(!is_held.load(SeqCst), SeqCst);
            });
            while locks.state.lock().waiting < 2 {
                thread::yield_now();
            }
            assert!(!is_held.load(SeqCst));
            drop(shared);
        });
        assert!(is_held.load(SeqCst));
        assert!(!was_overtaken.load(SeqCst), "the earlier one comes first");
    }
}
