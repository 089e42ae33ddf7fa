//! Tables that are being read from the file.
//!
//! No lock of the cache is held meanwhile, so nobody waits for the disk but those who need the same
//! table. They wait here, and the table is read once.

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
enum State {
    #[default]
    Running,
    /// With the table, unless it could not be read.
    Ended(Option<Arc<Table>>),
}

impl Load {
    /// Waits for the thread that reads the table; `None` if it could not, and another
    /// thread has to try.
    pub(super) fn wait(&self) -> Option<Arc<Table>> {
        let mut state = self.state.lock();
        loop {
            match &*state {
                State::Ended(table) => return table.clone(),
                State::Running => state = state.wait(&self.has_ended),
            }
        }
    }

    /// Gives the table, which is in the cache now, to those that wait.
    pub(super) fn end(&self, table: Arc<Table>) {
        *self.state.lock() = State::Ended(Some(table));
        self.has_ended.notify_all();
    }

    /// Wakes those that wait if the table was not read.
    pub(super) fn give_up(&self) {
        let mut state = self.state.lock();
        if matches!(*state, State::Running) {
            *state = State::Ended(None);
        }
        drop(state);
        self.has_ended.notify_all();
    }
}
