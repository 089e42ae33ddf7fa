//! Measures the time of requests in flight, if there is a limit.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use nbd_proto::wire::Cookie;
use tokio::time::{Instant, Sleep, sleep_until};

/// Most answered requests that may remain in the list after an unanswered one.
const ANSWERED_MAX: usize = 1024;

/// Requests in the order in which they were sent. All have the same time limit, so the first
/// unanswered one is the first to time out.
#[derive(Debug)]
pub(crate) struct RequestTimer {
    limit: Duration,
    sent: VecDeque<(Cookie, Instant)>,
    timer: Pin<Box<Sleep>>,
}

impl RequestTimer {
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, sent: VecDeque::new(), timer: Box::pin(sleep_until(Instant::now())) }
    }

    pub(crate) const fn limit(&self) -> Duration {
        self.limit
    }

    /// Records a request that is sent now. `is_open` returns whether a request is unanswered.
    pub(crate) fn note(&mut self, cookie: Cookie, now: Instant, is_open: impl Fn(Cookie) -> bool) {
        if self.sent.len() >= ANSWERED_MAX && self.sent.len() == self.sent.capacity() {
            // Instead of growing; if most requests are open, the list grows.
            self.sent.retain(|(cookie, _)| is_open(*cookie));
        }
        self.sent.push_back((cookie, now));
    }

    /// Ready with a request that was not answered in time; otherwise `cx` is woken when the oldest
    /// one times out.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        is_open: impl Fn(Cookie) -> bool,
    ) -> Poll<Cookie> {
        while let Some((cookie, sent)) = self.sent.front().copied() {
            if !is_open(cookie) {
                self.sent.pop_front();
                continue;
            }
            // Beyond the range of the clock nothing is limited.
            let Some(late) = sent.checked_add(self.limit) else { return Poll::Pending };
            if late <= Instant::now() {
                return Poll::Ready(cookie);
            }
            if self.timer.deadline() != late {
                self.timer.as_mut().reset(late);
            }
            match self.timer.as_mut().poll(cx) {
                Poll::Ready(()) => {}
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Pending
    }
}
