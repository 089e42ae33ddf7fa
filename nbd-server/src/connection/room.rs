//! Large buffers, which a connection gets while it is busy.
//!
//! A client with many requests in flight is served best with a large receive buffer and many queued
//! replies. A thousand such clients that read nothing would hold gigabytes. Therefore only as many
//! connections as there is memory for get large buffers; the others use small ones.

use crate::budget::{Budget, Permit};

/// The memory of a connection with large buffers, in bytes: replies, blocks kept for the next ones,
/// and received bytes.
const ROOM_LEN: usize = 1536 * 1024;

/// One connection's share of the memory.
pub(super) struct Room {
    shared: Budget,
    lent: Option<Permit>,
}

impl Room {
    pub(super) const fn new(shared: Budget) -> Self {
        Self { shared, lent: None }
    }

    /// Whether the connection may have large buffers.
    pub(super) const fn is_lent(&self) -> bool {
        self.lent.is_some()
    }

    /// Requests the memory.
    pub(super) fn ask(&mut self) -> bool {
        if self.lent.is_none() {
            self.lent = self.shared.try_take(ROOM_LEN);
        }
        self.is_lent()
    }

    /// Returns the memory if others may need it; true if the large buffers have to be freed.
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
