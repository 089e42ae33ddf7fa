//! Limits the clients of the control socket. An idle client loses its slot to a new one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Most clients at a time. A running backup is one.
const MAX_CLIENTS: usize = 64;

/// The slots of one socket.
#[derive(Clone, Default)]
pub(super) struct ClientSlots {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The least recently active clients come first.
    taken: Vec<TakenSlot>,
    next: u64,
}

struct TakenSlot {
    id: u64,
    activity: Activity,
    evicted: Arc<Notify>,
}

/// Whether a client may be evicted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Activity {
    /// It may.
    Idle,
    /// It may not: a request of the client is in progress, or a checkpoint is bound to its
    /// connection.
    Busy,
}

/// The slot of one client. Freed on drop.
pub(super) struct ClientSlot {
    slots: ClientSlots,
    id: u64,
    evicted: Arc<Notify>,
}

impl ClientSlots {
    /// Returns a slot for a new client. If none is free, the longest idle client is evicted; `None`
    /// if no client is idle.
    pub(super) fn take(&self) -> Option<ClientSlot> {
        let mut state = self.state();
        if state.taken.len() >= MAX_CLIENTS {
            let idle = state.taken.iter().position(|taken| taken.activity == Activity::Idle)?;
            state.taken.remove(idle).evicted.notify_one();
        }
        let id = state.next;
        state.next += 1;
        let evicted = Arc::new(Notify::new());
        let slot = TakenSlot { id, activity: Activity::Idle, evicted: Arc::clone(&evicted) };
        state.taken.push(slot);
        drop(state);
        Some(ClientSlot { slots: self.clone(), id, evicted })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientSlot {
    /// Records activity of the client. Returns false if it was evicted.
    pub(super) fn set(&self, activity: Activity) -> bool {
        let mut state = self.slots.state();
        let Some(index) = state.taken.iter().position(|taken| taken.id == self.id) else {
            return false;
        };
        let mut taken = state.taken.remove(index);
        taken.activity = activity;
        state.taken.push(taken);
        true
    }

    /// Waits until the client is evicted.
    pub(super) async fn evicted(&self) {
        self.evicted.notified().await;
    }
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        self.slots.state().taken.retain(|taken| taken.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn client_that_is_idle_for_longest_makes_room() {
        let slots = ClientSlots::default();
        let taken: Vec<_> = (0..MAX_CLIENTS).map(|_| slots.take().unwrap()).collect();
        assert!(taken[0].set(Activity::Idle), "it has just spoken");
        assert!(taken[1].set(Activity::Busy));
        let newcomer = slots.take().unwrap();
        taken[2].evicted().await;
        assert!(!taken[2].set(Activity::Busy), "it is too late");
        for slot in taken.iter().skip(3).chain([&taken[0], &newcomer]) {
            assert!(slot.set(Activity::Busy));
        }
        assert!(slots.take().is_none(), "no client is idle");
        drop(taken);
        let taken: Vec<_> = (1..MAX_CLIENTS).map(|_| slots.take().unwrap()).collect();
        assert!(taken.iter().all(|slot| slot.set(Activity::Idle)));
    }
}
