//! Clients that owe something and do nothing about it: the rest of a request, or to take their
//! replies. As long as they do not, this connection holds memory that others may want.
//!
//! A busy connection stops in the middle of a request many times a second, so nothing is measured
//! there: a timer is set at the first stop and left alone. When it is over, at a stop again, it is
//! seen whether anything has moved since it was set.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

use super::error::{Awaiting, ConnectionError};
use super::plain::Traffic;

/// Looks in a row that find nothing moved, each a part of the limit after the one before.
const LOOKS: u32 = 4;
/// Shortest time between looks.
const SHORTEST_PERIOD: Duration = Duration::from_millis(1);

/// How far a connection is. The same at two moments if no byte has moved between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Movement {
    /// Bytes that went through the receive buffer.
    pub(super) received: u64,
    /// Bytes of a payload that is received beside it.
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
    /// Looks that found nothing moved.
    vain: u32,
}

impl Stall {
    /// Without a limit no client is ever disconnected for stalling.
    pub(super) const fn new(limit: Option<Duration>) -> Self {
        Self { limit, timer: None, last: None, vain: 0 }
    }

    /// The client owes nothing.
    pub(super) const fn settled(&mut self) {
        self.last = None;
        self.vain = 0;
    }

    /// The client owes something and nothing moves at this moment. Ready when that is so for too
    /// long; otherwise `cx` is woken to look again.
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
        // Has the task woken. A new timer is never over yet.
        let _ = timer.as_mut().poll(cx);
        self.timer = Some(timer);
        Poll::Pending
    }
}
