//! How the next requests are read: as the runtime reports them, after a [pause](super::coalescing)
//! that suits a client with a deep queue, or by [asking](super::polling) for them, which suits a
//! client with a single request in flight. The latter two delay the thread for a moment; they are
//! for connections that have their thread to themselves and no other request in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::coalescing::Coalescing;
use super::polling::Polling;
use super::receive::ReceiveBuffer;
use super::socket::Socket;

/// Only clients whose requests are no longer than this on average are examined. In bytes.
const SMALL_LEN: usize = 16 * 1024;

/// The habits of one client.
#[derive(Debug)]
pub(super) struct ReadStrategy {
    coalescing: Coalescing,
    polling: Polling,
    /// Number of connections of this worker thread, this one included.
    neighbours: Arc<AtomicUsize>,
    /// Requests taken from the buffer since the last read.
    taken: usize,
    /// Bytes they read and write.
    moved: usize,
}

/// Whether a connection only waits for requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Idle {
    /// Every reply is sent.
    Yes,
    /// Replies are being prepared or sent.
    No,
}

impl ReadStrategy {
    pub(super) fn new(polling: Polling, neighbours: Arc<AtomicUsize>) -> Self {
        Self { coalescing: Coalescing::default(), polling, neighbours, taken: 0, moved: 0 }
    }

    /// Counts a request, taken from the buffer, that reads or writes `length` bytes.
    pub(super) fn count(&mut self, length: usize) {
        self.taken += 1;
        self.moved = self.moved.saturating_add(length);
    }

    /// Whether the thread has no other connection.
    pub(super) fn is_alone(&self) -> bool {
        self.neighbours.load(Ordering::Relaxed) <= 1
    }

    /// Whether the first replies of a batch should leave before the last request is carried out.
    /// Other connections of the thread have work while the client receives; and paced batches are
    /// small, and the client works during the pause.
    pub(super) fn wants_portions(&self) -> bool {
        self.is_alone() && !self.coalescing.paces()
    }

    /// Reads with the strategy that suits the client. False if the runtime has to report when there
    /// is something to read.
    pub(super) fn read(
        &mut self,
        socket: &mut Socket,
        idle: Idle,
        input: &mut ReceiveBuffer,
    ) -> bool {
        let taken = std::mem::take(&mut self.taken);
        let moved = std::mem::take(&mut self.moved);
        let is_small = moved / taken.max(1) <= SMALL_LEN;
        if idle == Idle::No || !is_small || !self.is_alone() {
            return false;
        }
        let mut look = || {
            let received = socket.read_now(input.space());
            input.received(received);
            received > 0
        };
        match self.coalescing.after_batch(taken, Instant::now) {
            Some(pause) => {
                std::thread::sleep(pause);
                look()
            }
            None => taken > 0 && self.polling.after_batch(look),
        }
    }
}
