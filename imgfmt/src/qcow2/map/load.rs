//! Tables that are being read from the file.
//!
//! No lock of the cache is held meanwhile, so only threads that need the same table wait for the
//! disk. They wait here, and the table is read once.

use std::sync::{Arc, Condvar};

use crate::ordered_lock::{OrderedMutex, rank};
use crate::qcow2::map::table::Table;

/// A table that one thread reads.
#[derive(Debug, Default)]
pub(super) struct Load {
    state: OrderedMutex<{ rank::TABLE_LOAD }, State>,
    has_ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The table; the inner `None` if it could not be read.
    ended: Option<Option<Arc<Table>>>,
    /// Whether a thread waits. Waking takes a system call, and usually no thread waits.
    is_awaited: bool,
}

impl Load {
    /// Waits for the thread that reads the table; `None` if it could not, and another
    /// thread has to try.
    pub(super) fn wait(&self) -> Option<Arc<Table>> {
        let mut state = self.state.lock();
        loop {
            if let Some(table) = &state.ended {
                return table.clone();
            }
            state.is_awaited = true;
            state = state.wait(&self.has_ended);
        }
    }

    /// Passes the table, which is in the cache now, to the waiting threads.
    pub(super) fn end(&self, table: Arc<Table>) {
        self.finish(Some(table));
    }

    /// Wakes the waiting threads if the table was not read.
    pub(super) fn give_up(&self) {
        self.finish(None);
    }

    /// The first outcome counts.
    fn finish(&self, table: Option<Arc<Table>>) {
        let mut state = self.state.lock();
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(table);
        let is_awaited = state.is_awaited;
        drop(state);
        if is_awaited {
            self.has_ended.notify_all();
        }
    }
}
