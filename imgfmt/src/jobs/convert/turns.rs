//! The order in which threads write what they have prepared in parallel.

use std::sync::Condvar;

use crate::ordered_lock::{OrderedMutex, rank};

/// Whose turn it is. Each thread holds one piece while it waits, so memory is bounded.
#[derive(Debug, Default)]
pub(super) struct Turns {
    state: OrderedMutex<{ rank::TURN }, State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// A piece will never be written: no thread need wait any more.
    is_over: bool,
}

impl Turns {
    /// Waits until all pieces before this one are written. `false` if that will not happen.
    pub(super) fn wait_for(&self, number: u64) -> bool {
        let mut state = self.state.lock();
        while state.next != number && !state.is_over {
            state = state.wait(&self.changed);
        }
        !state.is_over
    }

    /// The piece whose turn it is is written.
    pub(super) fn pass(&self) {
        self.state.lock().next += 1;
        self.changed.notify_all();
    }

    /// A piece could not be written.
    pub(super) fn end(&self) {
        self.state.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Ends them if the thread panics while this lives: the others would wait forever.
    pub(super) fn ended_by_panic(&self) -> EndedByPanic<'_> {
        EndedByPanic(self)
    }
}

pub(super) struct EndedByPanic<'t>(&'t Turns);

impl Drop for EndedByPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end();
        }
    }
}
