//! Changes of a disk that are under way and that no thread of this crate carries out.

use std::sync::{Arc, Condvar};

use crate::ordered_lock::{OrderedMutex, rank};

/// Counts them.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    state: OrderedMutex<{ rank::ELSEWHERE }, State>,
    none: Condvar,
}

#[derive(Debug, Default)]
struct State {
    under_way: usize,
    /// The number of holders of [`Closed`].
    closed: usize,
}

/// A change that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct Counted(Arc<Elsewhere>);

/// None is under way, and none begins until this is dropped.
#[derive(Debug)]
pub(super) struct Closed<'a>(&'a Elsewhere);

impl Elsewhere {
    /// Counts a change, unless none may begin.
    pub(super) fn begin(self: &Arc<Self>) -> Option<Counted> {
        let mut state = self.state.lock();
        if state.closed > 0 {
            return None;
        }
        state.under_way += 1;
        Some(Counted(Arc::clone(self)))
    }

    /// Lets no further change begin, and waits until those under way are over.
    pub(super) fn close(&self) -> Closed<'_> {
        let mut state = self.state.lock();
        state.closed += 1;
        while state.under_way > 0 {
            state = state.wait(&self.none);
        }
        drop(state);
        Closed(self)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.under_way -= 1;
        if state.under_way == 0 {
            self.0.none.notify_all();
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.state.lock().closed -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::thread;

    use super::*;

    #[test]
    fn what_is_under_way_is_waited_for_and_nothing_else_begins_meanwhile() {
        let elsewhere = Arc::new(Elsewhere::default());
        let (one, two) = (elsewhere.begin().unwrap(), elsewhere.begin().unwrap());
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let closed = elsewhere.close();
                assert!(is_over.load(SeqCst));
                assert!(elsewhere.begin().is_none());
                drop(closed);
            });
            while elsewhere.begin().is_some() {
                thread::yield_now();
            }
            drop(one);
            is_over.store(true, SeqCst);
            drop(two);
        });
        assert!(elsewhere.begin().is_some());
    }
}
