//! Large buffers, which a connection has while it is busy.
//!
//! A client with many requests in flight is served best with a large receive buffer and many queued
//! replies. A thousand clients that all have that, and read nothing, would hold gigabytes.
//! Therefore the buffers are lent to as many connections as there is memory for; the others use
//! small buffers.

use crate::budget::{Budget, Permit};

/// What a connection with large buffers holds, in bytes: replies, blocks kept for the next ones,
/// and what is received.
const ROOM_LEN: usize = 1536 * 1024;

/// One connection's room.
pub(super) struct Room {
    shared: Budget,
    lent: Option<Permit>,
}

impl Room {
    pub(super) const fn new(shared: Budget) -> Self {
        Self { shared, lent: None }
    }

    /// May the connection have large buffers?
    pub(super) const fn is_lent(&self) -> bool {
        self.lent.is_some()
    }

    /// Asks for it.
    pub(super) fn ask(&mut self) -> bool {
        if self.lent.is_none() {
            self.lent = self.shared.try_take(ROOM_LEN);
        }
        self.is_lent()
    }

    /// Gives it back if others may want it; true if the large buffers have to go.
    pub(super) fn offer(&mut self) -> bool {
        self.lent.is_some() && self.shared.is_scarce() && self.lent.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_lent_while_there_is_any_and_given_back_by_the_idle_when_it_gets_scarce() {
        let shared = Budget::new(8 * ROOM_LEN);
        let mut rooms: Vec<_> = (0..9).map(|_| Room::new(shared.clone())).collect();
        assert!(rooms[..6].iter_mut().all(Room::ask));
        assert!(!rooms[0].offer(), "nobody wants it");
        assert!(rooms[6..8].iter_mut().all(Room::ask));
        assert!(!rooms[8].ask());
        assert!(rooms[0].offer() && !rooms[0].is_lent());
        assert!(rooms[8].ask());
        assert!(!rooms[0].offer(), "it has none");
    }
}
