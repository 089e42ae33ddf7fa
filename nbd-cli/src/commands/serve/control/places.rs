//! Places for clients of the control socket. One that says nothing does not keep its place from one
//! that comes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Clients at a time. A backup is one as long as it runs.
const MAX_CLIENTS: usize = 64;

/// The places of one socket.
#[derive(Clone, Default)]
pub(super) struct Places {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Those who came or spoke least recently come first.
    taken: Vec<Taken>,
    next: u64,
}

struct Taken {
    id: u64,
    keeps: Keeps,
    leave: Arc<Notify>,
}

/// What keeps a client in its place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keeps {
    /// Nothing: it may have to leave.
    Nothing,
    /// A request of it is being carried out, or something lasts as long as it stays.
    Place,
}

/// The place of one client. Free again when this is dropped.
pub(super) struct Place {
    places: Places,
    id: u64,
    leave: Arc<Notify>,
}

impl Places {
    /// A place for a new client. If there is none, whoever has been idle for longest has to leave; `None`
    /// if nobody is idle.
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
    /// The client has said something, or its request was carried out. False if it has had to leave.
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

    /// Waits until the client has to leave.
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
