//! Waiting for the disk on the connection's thread, for a client with one request in flight.
//!
//! While the disk works, such a client sends nothing, so its thread can wait for the disk itself:
//! one system call reads or writes, and the thread is woken once. Through the ring, this takes
//! three calls, and a thread of the kernel reports the end of a write that bypasses the page cache.
//!
//! A disk may hang, and its thread with it. So only connections that have their thread to
//! themselves wait in this way, on at most half of the threads, and new connections go to the other
//! threads meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::slots::{Seat, Slots};

/// A longer wait counts as a failure.
const LONG: Duration = Duration::from_millis(100);

/// Number of single requests in a row before the thread waits for one, and its limit after
/// failures, each of which doubles it.
const TRIED_AFTER: u32 = 16;
const MOST_TRIED_AFTER: u32 = 64 * 1024;
/// Successes after which failures are forgotten.
const FORGETS_AFTER: u32 = 256;
/// The socket is checked once in this many waits.
const LOOKS_ONCE_IN: u32 = 8;

/// The number of connections that a waiting thread counts as: more than any thread has.
const WAITING: usize = 1 << 24;

/// The habits of one client.
#[derive(Debug)]
pub(super) struct DiskWait {
    slots: Slots,
    /// Connections of this worker thread, this one included.
    connections: Arc<AtomicUsize>,
    singles: u32,
    tried_after: u32,
    successes: u32,
}

/// Lets the thread wait for the disk, until this is dropped.
#[derive(Debug)]
pub(super) struct MayWait<'a> {
    connections: &'a AtomicUsize,
    since: Instant,
    _seat: Seat<'a>,
}

impl DiskWait {
    pub(super) const fn new(slots: Slots, connections: Arc<AtomicUsize>) -> Self {
        Self { slots, connections, singles: 0, tried_after: TRIED_AFTER, successes: 0 }
    }

    /// Called before a request that may have to wait. `is_single` means that the client has no
    /// other request.
    pub(super) fn begin(&mut self, is_single: bool) -> Option<MayWait<'_>> {
        if !is_single {
            self.singles = 0;
            return None;
        }
        self.singles = self.singles.saturating_add(1);
        if self.singles <= self.tried_after {
            return None;
        }
        let seat = self.slots.take()?;
        let before = self.connections.fetch_add(WAITING, Relaxed);
        let may = MayWait { connections: &self.connections, since: Instant::now(), _seat: seat };
        (before <= 1).then_some(may)
    }

    /// Records how long the thread has waited. It was right if the client `has_sent` nothing
    /// meanwhile.
    pub(super) fn learn(&mut self, waited: Duration, has_sent: impl FnOnce() -> bool) {
        let is_looked_at = self.successes.is_multiple_of(LOOKS_ONCE_IN);
        if waited > LONG || is_looked_at && has_sent() {
            self.tried_after = self.tried_after.saturating_mul(2).min(MOST_TRIED_AFTER);
            (self.singles, self.successes) = (0, 0);
            return;
        }
        self.successes = self.successes.saturating_add(1);
        if self.successes >= FORGETS_AFTER {
            self.tried_after = TRIED_AFTER;
        }
    }
}

impl MayWait<'_> {
    /// The elapsed time.
    pub(super) fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for MayWait<'_> {
    fn drop(&mut self) {
        self.connections.fetch_sub(WAITING, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone() -> (DiskWait, Arc<AtomicUsize>) {
        let connections = Arc::new(AtomicUsize::new(1));
        (DiskWait::new(Slots::new(1), Arc::clone(&connections)), connections)
    }

    /// Single requests until one is waited for.
    fn singles_before_wait(wait: &mut DiskWait) -> u32 {
        let count = (0..).find(|_| wait.begin(true).is_some());
        count.unwrap()
    }

    #[test]
    fn only_clients_with_single_requests_are_waited_for() {
        let (mut wait, _) = alone();
        assert_eq!(singles_before_wait(&mut wait), TRIED_AFTER);
        wait.learn(Duration::ZERO, || false);
        assert!(wait.begin(true).is_some(), "it goes on");
        assert!(wait.begin(false).is_none());
        assert_eq!(singles_before_wait(&mut wait), TRIED_AFTER, "from the beginning");
    }

    #[test]
    fn a_thread_that_waits_is_no_place_for_others_and_one_with_others_does_not_wait() {
        let (mut wait, connections) = alone();
        singles_before_wait(&mut wait);
        let slots = wait.slots.clone();
        let waiting = wait.begin(true).unwrap();
        assert!(connections.load(Relaxed) > 1_000_000);
        assert!(slots.take().is_none(), "all slots are taken");
        drop(waiting);
        assert_eq!(connections.load(Relaxed), 1);
        let taken = slots.take();
        assert!(wait.begin(true).is_none());
        drop(taken);
        connections.store(2, Relaxed);
        assert!(wait.begin(true).is_none());
        assert_eq!(connections.load(Relaxed), 2);
    }

    #[test]
    fn a_slow_disk_or_a_client_that_sends_meanwhile_is_tried_ever_more_rarely() {
        let failures: [fn(&mut DiskWait); 2] =
            [|wait| wait.learn(2 * LONG, || false), |wait| wait.learn(Duration::ZERO, || true)];
        for fail in failures {
            let (mut wait, _) = alone();
            for doubled in [1, 2, 4, 8] {
                assert_eq!(singles_before_wait(&mut wait), TRIED_AFTER * doubled);
                fail(&mut wait);
            }
            singles_before_wait(&mut wait);
            (0..=FORGETS_AFTER).for_each(|_| wait.learn(Duration::ZERO, || false));
            assert!(wait.begin(false).is_none());
            assert_eq!(singles_before_wait(&mut wait), TRIED_AFTER, "all is forgotten");
        }
    }
}
