//! Requests that wait until the quotas of the client and of the export allow them.

use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use nbd_proto::transmission::Command;
use tokio::time::{Instant, Sleep, sleep_until};

use super::incoming::Arrival;
use crate::quota::{Admission, Reservation};

/// Waiting requests notice a change of a quota within this time.
const CHANGE_PERIOD: Duration = Duration::from_millis(500);

/// Keeps a connection within its quotas. Excess requests stay in the receive buffer and, when that
/// is full, with the client: they hold no memory, thread or place in a queue.
pub(super) struct Throttle {
    admission: Admission,
    /// Number of quotas from which the next request was paid.
    paid: usize,
    /// The time at which the next quota allows the request, and the amount taken from it.
    waiting: Option<Waiting>,
    is_open: bool,
}

struct Waiting {
    until: Instant,
    taken: Reservation,
    /// Ends at that time, or earlier to check whether the quota has changed.
    sleep: Pin<Box<Sleep>>,
}

impl Waiting {
    fn new(until: Instant, taken: Reservation) -> Self {
        Self { until, taken, sleep: Box::pin(sleep_until(next_look(until))) }
    }
}

fn next_look(until: Instant) -> Instant {
    until.min(Instant::now() + CHANGE_PERIOD)
}

impl Throttle {
    pub(super) const fn new(admission: Admission) -> Self {
        Self { admission, paid: 0, waiting: None, is_open: false }
    }

    /// Whether the arrival may be carried out or refused. If not, `cx` is woken when it may. The
    /// answer stays the same until the request [has begun](Self::begun).
    #[inline]
    pub(super) fn admits(&mut self, cx: &mut Context<'_>, arrival: &Arrival) -> bool {
        let has_limit = self.waiting.is_some() || !self.admission.is_unlimited();
        !has_limit || self.admits_limited(cx, arrival)
    }

    fn admits_limited(&mut self, cx: &mut Context<'_>, arrival: &Arrival) -> bool {
        let bytes = match arrival {
            Arrival::Request(request, _) => match request.command {
                Command::Disconnect => return true,
                Command::Read(_) | Command::Write(_) => request.length,
                _ => 0,
            },
            // It was paid for when its header came.
            Arrival::Payload(..) | Arrival::Discarded(_) => return true,
            Arrival::Refused { payload_len, .. } => *payload_len,
        };
        if self.is_open {
            return true;
        }
        loop {
            if let Some(Waiting { until, taken, sleep }) = &mut self.waiting {
                if sleep.as_mut().poll(cx).is_pending() {
                    return false;
                }
                if self.admission.is_void(self.paid, *taken) {
                    self.waiting = None;
                } else if Instant::now() < *until {
                    sleep.as_mut().reset(next_look(*until));
                    continue;
                } else {
                    self.waiting = None;
                    self.paid += 1;
                }
            }
            match self.admission.reserve(self.paid, bytes) {
                None => return true,
                Some((None, _)) => self.paid += 1,
                Some((Some(at), taken)) => {
                    self.waiting = Some(Waiting::new(at.into(), taken));
                }
            }
        }
    }

    /// Records that the request has begun: from now on, [`admits`](Self::admits) is about the next
    /// one.
    pub(super) const fn begun(&mut self) {
        self.paid = 0;
    }

    /// Whether a request waits.
    pub(super) const fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Ends the throttling, when the server ends: received requests are carried out without delay.
    pub(super) fn open(&mut self) {
        self.give_back();
        self.is_open = true;
    }

    fn give_back(&mut self) {
        if let Some(Waiting { taken, .. }) = self.waiting.take() {
            self.admission.give_back(self.paid, taken);
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.give_back();
    }
}
