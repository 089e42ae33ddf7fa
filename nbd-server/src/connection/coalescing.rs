//! Request coalescing for a client that keeps many requests in flight.
//!
//! Such a client submits its requests one by one, between the replies that it receives. Answering
//! each at once makes both sides wake each other for almost every request, and a wakeup costs more
//! than a small request. So, while the queue is deep, the server pauses for a moment before it
//! reads, just long enough for a few requests to arrive. Meanwhile the client processes earlier
//! replies and does not wait, no thread is woken, and one read and one write transfer all of them.
//!
//! The depth of the queue is determined by experiment. If even the longest pause yields only one or
//! two requests, the client had no more, and a few such pauses end the attempt. A client with few
//! requests in flight is hardly ever paused. Requests that arrive one by one can be a deep queue
//! too, if both sides are equally fast: a single occasional pause detects that, at growing
//! intervals if it finds nothing.
//!
//! A client that sends several requests at a time is faster without pauses, which only a
//! [trial](super::trial) shows.

use std::time::{Duration, Instant};

use super::trial::Trial;

/// The target size of a batch, in requests. Larger batches save little, and would be most of a
/// queue of moderate depth.
const WANTED: usize = 7;
/// A paced batch below this many requests suggests a shallow queue.
const LEAST: usize = 3;
/// Small batches in a row that end the pacing.
const STRIKES: u32 = 16;
/// Bounds of a pause.
const SHORTEST: Duration = Duration::from_micros(2);
const LONGEST: Duration = Duration::from_micros(60);
/// The first pause.
const FIRST: Duration = Duration::from_micros(16);
/// Batches of several requests, in excess of batches of one, before pacing is tried first.
const EVIDENCE: u32 = 16;
/// Limit of the same after failed attempts, each of which doubles it.
const MOST_EVIDENCE: u32 = 16 * 1024;
/// Minimum number of batches of one request before a single pause tests whether more requests
/// follow.
const PROBE_AFTER: u32 = 4096;
/// Limit of the same, which each useless pause doubles. A client with one request in flight waits
/// once in this many batches.
const MOST_PROBE_AFTER: u32 = 64 * 1024;
/// Good batches after which earlier failures are forgotten.
const FORGETS_AFTER: u32 = 64;

const OFF: State = State::Off { evidence: 0, batches: 0 };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Requests are answered as they arrive.
    Off { evidence: u32, batches: u32 },
    /// The same, after a single pause.
    Probing,
    /// The client is paced, unless a trial shows that it is faster without.
    On { pause: Duration, strikes: u32, good: u32 },
}

/// The state of one client's queue.
#[derive(Debug)]
pub(super) struct Coalescing {
    state: State,
    needed: u32,
    probe_after: u32,
    trial: Trial,
}

impl Default for Coalescing {
    fn default() -> Self {
        let trial = Trial::default();
        Self { state: OFF, needed: EVIDENCE, probe_after: PROBE_AFTER, trial }
    }
}

impl Coalescing {
    /// Whether the client is paused between batches at present.
    pub(super) const fn paces(&self) -> bool {
        matches!(self.state, State::On { .. }) && self.trial.paces()
    }

    /// Records an answered batch of `requests`, and returns the pause before the next read. `now`
    /// is called seldom.
    pub(super) fn after_batch(
        &mut self,
        requests: usize,
        now: impl FnOnce() -> Instant,
    ) -> Option<Duration> {
        let is_unpaced = !self.trial.paces();
        if let State::On { .. } = self.state {
            self.trial.after_batch(requests, now);
        }
        self.state = match self.state {
            State::Off { .. } | State::Probing if requests == 0 => return None,
            // Without pauses, small batches say nothing about the queue.
            on @ State::On { .. } if is_unpaced => on,
            State::Off { evidence, batches } => {
                let evidence =
                    if requests == 1 { evidence.saturating_sub(1) } else { evidence + 1 };
                if evidence >= self.needed {
                    State::On { pause: FIRST, strikes: 0, good: 0 }
                } else if batches >= self.probe_after {
                    self.state = State::Probing;
                    return Some(FIRST);
                } else {
                    State::Off { evidence, batches: batches + 1 }
                }
            }
            State::Probing if requests >= LEAST => {
                self.probe_after = PROBE_AFTER;
                State::On { pause: FIRST, strikes: 0, good: 0 }
            }
            State::Probing => {
                self.probe_after = self.probe_after.saturating_mul(2).min(MOST_PROBE_AFTER);
                OFF
            }
            State::On { pause, good, .. } if requests >= LEAST => {
                if good >= FORGETS_AFTER {
                    self.needed = EVIDENCE;
                }
                let pause = adjusted(pause, requests);
                State::On { pause, strikes: 0, good: good.saturating_add(1) }
            }
            State::On { pause, strikes, good } if strikes < STRIKES => {
                State::On { pause: adjusted(pause, requests), strikes: strikes + 1, good }
            }
            State::On { .. } => {
                self.trial = Trial::default();
                self.needed = self.needed.saturating_mul(2).min(MOST_EVIDENCE);
                self.probe_after = self.probe_after.saturating_mul(2).min(MOST_PROBE_AFTER);
                OFF
            }
        };
        match self.state {
            State::Off { .. } | State::Probing => None,
            State::On { pause, .. } => self.paces().then_some(pause),
        }
    }
}

/// Steers towards the wanted batch by an eighth at a time.
fn adjusted(pause: Duration, requests: usize) -> Duration {
    let step = pause / 8;
    let next = match requests.cmp(&WANTED) {
        std::cmp::Ordering::Less => pause + step,
        std::cmp::Ordering::Equal => pause,
        std::cmp::Ordering::Greater => pause - step,
    };
    next.clamp(SHORTEST, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client that pauses make faster.
    struct Client {
        coalescing: Coalescing,
        now: Instant,
    }

    impl Client {
        fn new() -> Self {
            Self { coalescing: Coalescing::default(), now: Instant::now() }
        }

        fn after_batch(&mut self, requests: usize) -> Option<Duration> {
            let pause = self.coalescing.after_batch(requests, || self.now);
            self.now += Duration::from_micros(if pause.is_some() { 1 } else { 2 });
            pause
        }

        fn pauses(&mut self, batches: u32, requests: usize) -> usize {
            (0..batches).filter(|_| self.after_batch(requests).is_some()).count()
        }
    }

    #[test]
    fn a_client_with_one_request_in_flight_hardly_ever_waits() {
        let mut client = Client::new();
        assert_eq!(client.pauses(PROBE_AFTER, 1), 0);
        let paused = client.pauses(1_000_000, 1);
        assert!((1..25).contains(&paused), "{paused} pauses");
    }

    #[test]
    fn a_deep_queue_that_comes_one_by_one_is_found_by_a_pause() {
        let mut client = Client::new();
        assert_eq!(client.pauses(PROBE_AFTER, 1), 0);
        assert!(client.after_batch(1).is_some(), "the probe");
        assert_eq!(client.after_batch(0), None, "nothing says anything yet");
        assert!(client.pauses(1000, 8) > 700, "all but the windows without");
    }

    #[test]
    fn a_shallow_queue_is_tried_ever_more_seldom() {
        let paused = Client::new().pauses(100_000, 2);
        assert!((1..500).contains(&paused), "{paused} pauses");
    }

    #[test]
    fn a_deep_queue_is_paced_until_it_gets_shallow() {
        let mut client = Client::new();
        client.pauses(EVIDENCE, 2);
        client.pauses(1000, 8);
        assert_eq!(client.pauses(1000, 8), 1000, "a trial has shown that pauses are good");
        assert_eq!(client.pauses(1000, 1), STRIKES as usize);
    }

    #[test]
    fn the_pause_settles_where_a_handful_arrives() {
        let mut client = Client::new();
        client.pauses(EVIDENCE, 2);
        let mut pause = FIRST;
        // A client that submits a request every five microseconds, and a timer that is late by ten.
        for _ in 0..2000 {
            let arrived = ((pause.as_micros() + 10) / 5) as usize;
            pause = client.after_batch(arrived).unwrap_or(pause);
        }
        assert!((15..=25).contains(&pause.as_micros()), "{pause:?}");
    }
}
