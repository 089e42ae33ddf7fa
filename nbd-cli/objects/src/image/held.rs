//! Blocks in memory that have not been read yet.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::flights::Landed;
use super::sequences::AHEAD_MAX;

/// Most blocks: 64 MiB, what two readers have ahead.
const HELD_MAX: usize = 2 * AHEAD_MAX as usize;

/// Most of them that have been read: 8 MiB. Another reader may be a little behind, and of a part
/// that was read the rest may be wanted.
const READ_MAX: usize = 32;

/// The blocks, in the order in which they arrived.
#[derive(Debug, Default)]
pub(super) struct Held(Mutex<VecDeque<Landed>>);

impl Held {
    /// Holds a block. Returns the oldest one if there are too many: it has not been read.
    pub(super) fn hold(&self, landed: Landed) -> Option<Landed> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.push_back(landed);
        let most = if held.len() > HELD_MAX { 0 } else { READ_MAX };
        // By their places: requests overtake each other, so the first to arrive may be the last to
        // be read, and a reader that is behind still wants it.
        let mut read: Vec<_> =
            held.iter().filter(|it| it.is_read()).map(|it| it.key.block).collect();
        read.sort_unstable();
        if let Some(last) = read.len().checked_sub(most + 1).and_then(|at| read.get(at)) {
            held.retain(|it| it.key.block > *last || !it.is_read());
        }
        if held.len() > HELD_MAX { held.pop_front() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::super::cache_file::{BLOCK_LEN, Key};
    use super::super::flights::Flights;
    use super::*;

    const OBJECT: [u8; 16] = [1; 16];

    /// Has a block arrive. Returns the one that is handed back.
    fn land(flights: &Arc<Flights>, held: &Held, block: u64) -> Option<Landed> {
        let mut runs = flights.begin(OBJECT, block..block + 1, 1, |_| false);
        held.hold(runs[0].land(Bytes::from(vec![0; BLOCK_LEN])))
    }

    #[test]
    fn what_arrived_first_but_was_read_last_is_kept_for_a_reader_that_is_behind() {
        let (flights, held) = (Arc::new(Flights::default()), Held::default());
        let land = |block| land(&flights, &held, block);
        let flight = |block| flights.get(Key { object: OBJECT, block });
        let count = READ_MAX as u64 + 2;
        for block in (0..count).rev() {
            assert!(land(block).is_none());
        }
        for block in 0..count {
            flight(block).unwrap().note_read(0, BLOCK_LEN);
        }
        assert!(land(count).is_none());
        assert!(flight(count - 1).is_some() && flight(2).is_some());
        assert!(flight(0).is_none() && flight(1).is_none());
    }

    #[test]
    fn blocks_that_were_read_give_way_first_and_the_others_are_handed_back() {
        let (flights, held) = (Arc::new(Flights::default()), Held::default());
        let land = |block| land(&flights, &held, block);
        let flight = |block| flights.get(Key { object: OBJECT, block });
        let read = |block, offset, length| flight(block).unwrap().note_read(offset, length);
        let most = HELD_MAX as u64;
        for block in 0..most {
            assert!(land(block).is_none());
        }
        // A part of it, however often, is not the whole.
        for _ in 0..100 {
            read(0, 0, BLOCK_LEN - 4096);
            read(0, 1, 1);
        }
        assert_eq!(land(most).unwrap().key.block, 0);
        assert!(flight(0).is_none(), "who has it keeps it");
        for offset in (0..BLOCK_LEN).step_by(4096) {
            read(7, offset + 10, 100);
        }
        assert!(land(most + 1).is_none() && flight(7).is_none() && flight(1).is_some());
        // Room is not needed for all that were read.
        for block in 100..100 + 2 * READ_MAX as u64 {
            read(block, 0, BLOCK_LEN);
        }
        assert!(land(most + 2).is_none() && flight(100).is_none());
        assert_eq!(held.0.lock().unwrap().len(), HELD_MAX + 1 - 2 * READ_MAX);
    }
}
