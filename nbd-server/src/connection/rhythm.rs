//! How the next requests are read: as the runtime reports them, or in one of two ways that suit a
//! client better and hold the thread up for a moment. Those are for connections that have their
//! thread to themselves and nothing else in hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::lockstep::Lockstep;
use super::pace::Pace;
use super::receive::ReceiveBuffer;
use super::socket::Socket;

/// Only clients whose requests are no longer than this on average are looked at. In bytes.
const SMALL_LEN: usize = 16 * 1024;

/// The habits of one client.
#[derive(Debug)]
pub(super) struct Rhythm {
    pace: Pace,
    lockstep: Lockstep,
    /// Connections of this worker thread, this one included.
    neighbours: Arc<AtomicUsize>,
    /// Requests taken off the buffer since the last read.
    taken: usize,
    /// Bytes they read and write.
    moved: usize,
}

/// Whether a connection waits for nothing but requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Idle {
    /// Every reply is sent.
    Yes,
    /// Replies are being made or sent.
    No,
}

impl Rhythm {
    pub(super) fn new(neighbours: Arc<AtomicUsize>) -> Self {
        Self {
            pace: Pace::default(),
            lockstep: Lockstep::default(),
            neighbours,
            taken: 0,
            moved: 0,
        }
    }

    /// A request was taken off the buffer that reads or writes `length` bytes.
    pub(super) fn count(&mut self, length: usize) {
        self.taken += 1;
        self.moved = self.moved.saturating_add(length);
    }

    /// Reads in the way that suits the client. False if the runtime is to say when there is
    /// something to read.
    pub(super) fn read(
        &mut self,
        socket: &mut Socket,
        idle: Idle,
        input: &mut ReceiveBuffer,
    ) -> bool {
        let taken = std::mem::take(&mut self.taken);
        let moved = std::mem::take(&mut self.moved);
        let is_small = moved / taken.max(1) <= SMALL_LEN;
        if idle == Idle::No || !is_small || self.neighbours.load(Ordering::Relaxed) > 1 {
            self.end(socket);
            return false;
        }
        let mut received = 0;
        if self.lockstep.after_batch(taken) {
            received = self.lockstep.read(socket, input.space());
        } else {
            self.end(socket);
            if let Some(pause) = self.pace.after_batch(taken) {
                std::thread::sleep(pause);
                received = socket.read_now(input.space());
            }
        }
        input.received(received);
        received > 0
    }

    /// The socket is to be used in another way.
    pub(super) fn end(&mut self, socket: &Socket) {
        self.lockstep.end(socket);
    }
}
