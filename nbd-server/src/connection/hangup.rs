//! Detects clients that leave while their requests are in progress.
//!
//! A connection at its limits reads nothing, and so would not notice that its client has left
//! before it has a reply to send. It checks that periodically instead, while requests are in the
//! pool, because requests of a client that has left need not be carried out.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

/// Time between two checks.
const PERIOD: Duration = Duration::from_millis(100);

/// Watches one connection.
#[derive(Debug, Default)]
pub(super) struct Hangup {
    timer: Option<Pin<Box<Sleep>>>,
}

impl Hangup {
    /// Called when nothing moves and requests are in the pool. Ready when `has_hung_up` was true;
    /// otherwise `cx` is woken to check again.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        has_hung_up: impl FnOnce() -> bool,
    ) -> Poll<()> {
        // As with stalls, a timer is not reset while requests come and go.
        if let Some(timer) = &mut self.timer {
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if has_hung_up() {
                return Poll::Ready(());
            }
        }
        let mut timer = Box::pin(sleep(PERIOD));
        // Registers the task to be woken. A new timer is not over yet.
        let _ = timer.as_mut().poll(cx);
        self.timer = Some(timer);
        Poll::Pending
    }
}
