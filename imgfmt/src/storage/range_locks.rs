//! Locks on ranges of a file, which keep a block that is read, changed and written back from changing
//! meanwhile.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Locks on ranges. A thread that holds one must not ask for another.
#[derive(Debug, Default)]
pub(super) struct RangeLocks {
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Holders of locks and waiters, in the order in which they came. An entry waits for those
    /// before it that conflict with it, so no thread waits for ever.
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
pub(super) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl RangeLocks {
    /// Waits until no exclusive lock is held on a part of `range`.
    pub(super) fn shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.lock(range, Mode::Shared)
    }

    /// Waits until no lock is held on a part of `range`.
    pub(super) fn exclusive(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.lock(range, Mode::Exclusive)
    }

    fn lock(&self, range: Range<u64>, mode: Mode) -> RangeGuard<'_> {
        let mut state = self.state();
        let id = state.next_id;
        state.next_id = id.wrapping_add(1);
        state.entries.push(Entry { id, range, mode });
        while state.is_blocked(id) {
            state.waiting += 1;
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        RangeGuard { locks: self, id }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.locks.state();
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
        let locks = RangeLocks::default();
        let _one = locks.shared(0..10);
        let _two = locks.shared(5..15);
        let _three = locks.exclusive(15..20);
    }

    #[test]
    fn an_exclusive_lock_waits_for_shared_ones_and_is_not_overtaken() {
        let locks = RangeLocks::default();
        let (is_held, was_overtaken) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = locks.shared(0..10);
        thread::scope(|scope| {
            scope.spawn(|| {
                let _held = locks.exclusive(9..12);
                is_held.store(true, SeqCst);
            });
            while locks.state().waiting < 1 {
                thread::yield_now();
            }
            scope.spawn(|| {
                let _held = locks.shared(11..13);
                was_overtaken.store(!is_held.load(SeqCst), SeqCst);
            });
            while locks.state().waiting < 2 {
                thread::yield_now();
            }
            assert!(!is_held.load(SeqCst));
            drop(shared);
        });
        assert!(is_held.load(SeqCst));
        assert!(!was_overtaken.load(SeqCst), "the earlier one comes first");
    }
}
