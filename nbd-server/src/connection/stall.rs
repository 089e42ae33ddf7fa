//! Detects clients that neither send the rest of a request nor receive their replies. Meanwhile
//! their connections hold memory that others may need.
//!
//! A busy connection stops in the middle of a request many times a second, so that must be cheap: a
//! timer is set at the first stop and not reset. If the connection is stopped when the timer is
//! over, it is checked whether anything has moved since.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

use super::error::{Awaiting, ConnectionError};
use super::plain::Traffic;

/// Number of checks in a row without movement that end a connection; the limit is divided among
/// them.
const LOOKS: u32 = 4;
/// Shortest time between checks.
const SHORTEST_PERIOD: Duration = Duration::from_millis(1);

/// The progress of a connection. It is equal at two moments if no byte has moved between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Movement {
    /// Bytes that went through the receive buffer.
    pub(super) received: u64,
    /// Bytes of a payload that is received into its own buffer.
    pub(super) payload: usize,
    /// Bytes of replies.
    pub(super) sent: u64,
    /// Bytes below these.
    pub(super) traffic: Traffic,
}

/// Watches one connection.
#[derive(Debug)]
pub(super) struct Stall {
    limit: Option<Duration>,
    timer: Option<Pin<Box<Sleep>>>,
    last: Option<Movement>,
    /// Number of checks without movement.
    vain: u32,
}

impl Stall {
    /// Watches with this limit; `None` never disconnects.
    pub(super) const fn new(limit: Option<Duration>) -> Self {
        Self { limit, timer: None, last: None, vain: 0 }
    }

    /// Records that the server does not wait for the client.
    pub(super) const fn settled(&mut self) {
        self.last = None;
        self.vain = 0;
    }

    /// Called when the server waits for the client and nothing moves. Ready when that lasts too
    /// long; otherwise `cx` is woken to check again.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        awaiting: Awaiting,
        movement: impl FnOnce() -> Movement,
    ) -> Poll<ConnectionError> {
        let Some(limit) = self.limit else { return Poll::Pending };
        if let Some(timer) = &mut self.timer {
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = movement();
            self.vain = if self.last == Some(now) { self.vain + 1 } else { 0 };
            self.last = Some(now);
            if self.vain >= LOOKS {
                return Poll::Ready(ConnectionError::Stalled { awaiting, limit });
            }
        }
        let period = (limit / LOOKS).max(SHORTEST_PERIOD);
        let mut timer = Box::pin(sleep(period));
        // Registers the task to be woken. A new timer is not over yet.
        let _ = timer.as_mut().poll(cx);
        self.timer = Some(timer);
        Poll::Pending
    }
}
