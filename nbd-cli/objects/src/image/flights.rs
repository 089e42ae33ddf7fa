//! Blocks that are being fetched: one request, however many wait.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use bytes::Bytes;

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::runtime::LOOK_EVERY;

use super::cache_file::{BLOCK_LEN, Key};

/// A 64th of a block, in bytes.
const PART_LEN: usize = BLOCK_LEN / 64;

/// The block that a request fetches.
#[derive(Debug, Default)]
pub(super) struct Flight {
    outcome: Mutex<Option<Result<Bytes>>>,
    landed: Condvar,
    /// Calls that wait or have waited; it changes under the lock of the outcome.
    waiters: AtomicU32,
    /// A bit for each 64th of the block that was read, at least in part.
    read: AtomicU64,
}

impl Flight {
    /// Waits for the block, or until `is_interrupted` says so.
    pub(super) fn wait(&self, is_interrupted: &dyn Fn() -> bool) -> Result<Bytes> {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            if is_interrupted() {
                let why = "the read from the store was interrupted";
                return Err(StoreError::new(StoreErrorKind::Interrupted, why));
            }
            self.waiters.fetch_add(1, Ordering::Relaxed);
            let waited = self.landed.wait_timeout(outcome, LOOK_EVERY);
            outcome = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Returns the block if it has arrived.
    pub(super) fn landed(&self) -> Option<Bytes> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.clone()?.ok()
    }

    /// Notes that a part was read.
    pub(super) fn note_read(&self, offset: usize, length: usize) {
        let (first, end) = (offset / PART_LEN, (offset + length).div_ceil(PART_LEN));
        let until = |part: usize| 1u64.checked_shl(part as u32).unwrap_or(0).wrapping_sub(1);
        self.read.fetch_or(until(end) & !until(first), Ordering::Relaxed);
    }

    fn land(&self, outcome: Result<Bytes>) {
        let mut place = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        place.get_or_insert(outcome);
        // Those who wake up find it unlocked; to wake nobody is a system call too.
        let has_waiters = self.waiters.load(Ordering::Relaxed) > 0;
        drop(place);
        if has_waiters {
            self.landed.notify_all();
        }
    }
}

/// All blocks that are being fetched.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<Key, Arc<Flight>>>);

impl Flights {
    pub(super) fn get(&self, key: Key) -> Option<Arc<Flight>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned()
    }

    /// Registers those blocks of a range that are neither here nor excluded, as runs of at most
    /// `longest` neighbours, which begin at multiples of that. The caller fetches each run.
    pub(super) fn begin(
        self: &Arc<Self>,
        object: [u8; 16],
        blocks: std::ops::Range<u64>,
        longest: u64,
        is_there: impl Fn(Key) -> bool,
    ) -> Vec<Run> {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut runs: Vec<Run> = Vec::new();
        for block in blocks {
            let key = Key { object, block };
            if flights.contains_key(&key) || is_there(key) {
                continue;
            }
            flights.insert(key, Arc::default());
            match runs.last_mut() {
                Some(run) if run.end == block && !block.is_multiple_of(longest) => run.end += 1,
                _ => runs.push(Run {
                    flights: Arc::clone(self),
                    object,
                    next: block,
                    end: block + 1,
                }),
            }
        }
        runs
    }

    fn end(&self, key: Key) -> Option<Arc<Flight>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&key)
    }
}

/// A block that has arrived, for those who come before it is in the cache.
#[derive(Debug)]
pub(super) struct Landed {
    flights: Arc<Flights>,
    flight: Arc<Flight>,
    pub(super) key: Key,
    pub(super) data: Bytes,
}

impl Landed {
    /// Returns whether something of each part was read.
    pub(super) fn is_read(&self) -> bool {
        let parts = self.data.len().div_ceil(PART_LEN) as u32;
        self.flight.read.load(Ordering::Relaxed).count_ones() >= parts
    }
}

impl Drop for Landed {
    fn drop(&mut self) {
        self.flights.end(self.key);
    }
}

/// Neighbouring blocks that one request fetches. If it is dropped before its end, the rest fails.
#[derive(Debug)]
pub(super) struct Run {
    flights: Arc<Flights>,
    object: [u8; 16],
    next: u64,
    end: u64,
}

impl Run {
    /// The blocks that have not arrived.
    pub(super) fn blocks(&self) -> std::ops::Range<u64> {
        self.next..self.end
    }

    /// The next block that arrives.
    pub(super) fn key(&self) -> Key {
        Key { object: self.object, block: self.next }
    }

    /// Hands out the next block, until the result is dropped.
    pub(super) fn land(&mut self, data: Bytes) -> Landed {
        let key = self.key();
        self.next += 1;
        let flight = self.flights.get(key).unwrap_or_default();
        flight.land(Ok(data.clone()));
        Landed { flights: Arc::clone(&self.flights), flight, key, data }
    }

    /// Hands out an error for all blocks that have not arrived.
    pub(super) fn fail(&mut self, error: &StoreError) {
        for block in self.next..self.end {
            if let Some(flight) = self.flights.end(Key { object: self.object, block }) {
                flight.land(Err(error.clone()));
            }
        }
        self.next = self.end;
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let why = "the read from the store was given up";
        self.fail(&StoreError::new(StoreErrorKind::Unavailable, why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OBJECT: [u8; 16] = [3; 16];

    #[test]
    fn block_is_fetched_once_and_neighbours_together() {
        let flights = Arc::new(Flights::default());
        let cached = |key: Key| key.block == 3;
        let runs = flights.begin(OBJECT, 0..8, 3, cached);
        let ranges: Vec<_> = runs.iter().map(Run::blocks).collect();
        assert_eq!(ranges, [0..3, 4..6, 6..8]);
        assert!(flights.begin(OBJECT, 0..8, 3, cached).is_empty(), "all are on their way");
        drop(runs);
        assert_eq!(flights.begin(OBJECT, 0..1, 3, cached).len(), 1);
    }

    #[test]
    fn all_who_wait_get_the_block_and_what_does_not_arrive_fails() {
        let flights = Arc::new(Flights::default());
        let mut runs = flights.begin(OBJECT, 0..2, 9, |_| false);
        let waiting: Vec<_> =
            (0..2).map(|block| flights.get(Key { object: OBJECT, block }).unwrap()).collect();
        std::thread::scope(|scope| {
            let waiters: Vec<_> =
                (0..4).map(|_| scope.spawn(|| waiting[0].wait(&|| false).unwrap())).collect();
            let landed = runs[0].land(Bytes::from_static(b"block"));
            for waiter in waiters {
                assert_eq!(waiter.join().unwrap(), "block");
            }
            // It is not in the cache yet.
            let late = flights.get(landed.key).unwrap();
            assert_eq!(late.landed().unwrap(), "block");
            assert!(flights.begin(OBJECT, 0..1, 9, |_| false).is_empty());
        });
        assert!(waiting[1].landed().is_none());
        let error = waiting[1].wait(&|| true).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Interrupted);
        drop(runs);
        let error = waiting[1].wait(&|| false).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
        assert!(flights.get(Key { object: OBJECT, block: 0 }).is_none());
    }
}
