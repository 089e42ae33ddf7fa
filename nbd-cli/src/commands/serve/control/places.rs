//! Limits the clients of the control socket. An idle client loses its place to a new one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Most clients at a time. A running backup is one.
const MAX_CLIENTS: usize = 64;

/// The places of one socket.
#[derive(Clone, Default)]
pub(super) struct Places {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The least recently active clients come first.
    taken: Vec<Taken>,
    next: u64,
}

struct Taken {
    id: u64,
    keeps: Keeps,
    leave: Arc<Notify>,
}

/// The reason for which a client keeps its place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keeps {
    /// None: it may be evicted.
    Nothing,
    /// A request of the client is in progress, or a checkpoint is bound to its connection.
    Place,
}

/// The place of one client. Freed on drop.
pub(super) struct Place {
    places: Places,
    id: u64,
    leave: Arc<Notify>,
}

impl Places {
    /// Returns a place for a new client. If there is none, the longest idle client is evicted;
    /// `None` if no client is idle.
    pub(super) fn take(&self) -> Option<Place> {
        let mut state = self.state();
        if state.taken.len() >= MAX_CLIENTS {
            let idle = state.taken.iter().position(|taken| taken.keeps == Keeps::Nothing)?;
            state.taken.remove(idle).leave.notify_one();
        }
        let id = state.next;
        state.next += 1;
        let leave = Arc::new(Notify::new());
        state.taken.push(Taken { id, keeps: Keeps::Nothing, leave: Arc::clone(&leave) });
        drop(state);
        Some(Place { places: self.clone(), id, leave })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Records activity of the client. Returns false if it was evicted.
    pub(super) fn set(&self, keeps: Keeps) -> bool {
        let mut state = self.places.state();
        let Some(index) = state.taken.iter().position(|taken| taken.id == self.id) else {
            return false;
        };
        let mut taken = state.taken.remove(index);
        taken.keeps = keeps;
        state.taken.push(taken);
        true
    }

    /// Waits until the client is evicted.
    pub(super) async fn left(&self) {
        self.leave.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.state().taken.retain(|taken| taken.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_is_idle_for_longest_makes_room() {
        let places = Places::default();
        let taken: Vec<_> = (0..MAX_CLIENTS).map(|_| places.take().unwrap()).collect();
        assert!(taken[0].set(Keeps::Nothing), "it has just spoken");
        assert!(taken[1].set(Keeps::Place));
        let newcomer = places.take().unwrap();
        taken[2].left().await;
        assert!(!taken[2].set(Keeps::Place), "it is too late");
        for place in taken.iter().skip(3).chain([&taken[0], &newcomer]) {
            assert!(place.set(Keeps::Place));
        }
        assert!(places.take().is_none(), "nobody is idle");
        drop(taken);
        let taken: Vec<_> = (1..MAX_CLIENTS).map(|_| places.take().unwrap()).collect();
        assert!(taken.iter().all(|place| place.set(Keeps::Nothing)));
    }
}
