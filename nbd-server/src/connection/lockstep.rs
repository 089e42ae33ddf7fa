//! Waiting for a client that has one request in flight at a time.
//!
//! Such a client sends its next request when it has the answer to the last, and both sides do nothing
//! but wait for each other. Waiting in the read itself then saves the call that waits for readiness
//! and the runtime around it, which for a small request is a good part of the whole. The
//! runtime and whatever else it has to do stand still meanwhile, so a wait is short, and it is only
//! for connections that have their thread to themselves.

use std::time::Duration;

use super::socket::Socket;

/// Batches of a single request in a row before the client is believed to send no other.
const EVIDENCE: u32 = 32;
/// The longest wait: how late the thread can be for a new connection or the end of the server. Far
/// longer than a client in step takes, and no harm if the system rounds it up to its clock's tick.
const LONGEST: Duration = Duration::from_millis(2);

/// What is known of a client's step.
#[derive(Debug, Default)]
pub(super) struct Lockstep {
    singles: u32,
    /// The socket waits in reads.
    is_waiting: bool,
}

impl Lockstep {
    /// Takes note of a batch of `requests` that was answered; true if the client is in step.
    pub(super) fn after_batch(&mut self, requests: usize) -> bool {
        self.singles = if requests == 1 { self.singles.saturating_add(1) } else { 0 };
        self.singles >= EVIDENCE
    }

    /// Waits for bytes and gives how many were read; 0 if none came, after which the client has to
    /// prove itself again.
    pub(super) fn read(&mut self, socket: &Socket, buffer: &mut [u8]) -> usize {
        if !self.is_waiting {
            self.is_waiting = socket.wait_in_reads(LONGEST).is_ok();
        }
        let read = if self.is_waiting { socket.read_waiting(buffer) } else { 0 };
        if read == 0 {
            self.end(socket);
        }
        read
    }

    /// Goes back to reads that do not wait. To be called before any other use of the socket.
    pub(super) fn end(&mut self, socket: &Socket) {
        if self.is_waiting {
            // Should it fail, calls still wait no longer than the bound that was set.
            self.is_waiting = socket.wait_in_runtime().is_err();
            self.singles = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_requests_in_a_row_make_a_step() {
        let mut lockstep = Lockstep::default();
        for _ in 0..1000 {
            assert!((1..EVIDENCE).all(|_| !lockstep.after_batch(1)));
            assert!(!lockstep.after_batch(2));
        }
        assert_eq!((0..100).filter(|_| lockstep.after_batch(1)).count() as u32, 101 - EVIDENCE);
    }

    #[tokio::test]
    async fn a_client_that_stops_is_left_to_the_runtime() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let socket = Socket::from_std_unix(ours).attach().unwrap();
        let mut lockstep = Lockstep { singles: EVIDENCE, is_waiting: false };
        assert_eq!(lockstep.read(&socket, &mut [0; 16]), 0);
        assert!(!lockstep.is_waiting && !lockstep.after_batch(1));
        // Would wait for ever.
        assert_eq!(socket.read_waiting(&mut [0; 16]), 0);
    }
}
