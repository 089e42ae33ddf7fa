//! Trials that show whether pauses make a client faster.
//!
//! A pause costs a timer and lets the thread sleep. It pays for a client that sends its requests
//! one by one, each of which would wake the server. A client that sends several at a time needs
//! none: it is faster if the server answers what is there. The server cannot see the difference in
//! what arrives, so it measures: windows with and without pauses alternate, and the shortest of
//! each kind are compared. The result holds for a number of requests, then the trial is repeated.

use std::time::{Duration, Instant};

/// Requests in a window: a few milliseconds of work.
const WINDOW: u32 = 512;
/// Windows of a trial. Several of each kind, so that an interruption does not decide it. An even
/// number, so that a trial ends as it began: with the earlier result.
const WINDOWS: u32 = 8;
/// Requests for which the result of the first trial holds. A window of the slower kind should cost
/// little of it.
const HOLDS: u32 = 64 * 1024;
/// Limit of the same, which each equal result doubles.
const MOST_HOLDS: u32 = 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Windows are measured; the number of those that have ended.
    Measures { ended: u32 },
    /// The result holds.
    Holds,
}

/// Whether one client is paced.
#[derive(Debug)]
pub(super) struct Trial {
    stage: Stage,
    paces: bool,
    /// Requests left in this window, or until the next trial.
    left: u32,
    /// The beginning of this window.
    since: Option<Instant>,
    /// The shortest windows with and without pauses.
    paced: Duration,
    unpaced: Duration,
    /// The number of requests for which the latest result holds.
    holds: u32,
}

impl Default for Trial {
    fn default() -> Self {
        Self {
            stage: Stage::Measures { ended: 0 },
            paces: true,
            left: WINDOW,
            since: None,
            paced: Duration::MAX,
            unpaced: Duration::MAX,
            holds: HOLDS,
        }
    }
}

impl Trial {
    /// Whether the client is paused now.
    pub(super) const fn paces(&self) -> bool {
        self.paces
    }

    /// Records an answered batch of `requests`. `now` is called once in a window.
    pub(super) fn after_batch(&mut self, requests: usize, now: impl FnOnce() -> Instant) {
        self.left = self.left.saturating_sub(u32::try_from(requests).unwrap_or(u32::MAX));
        if self.left > 0 && self.since.is_some() {
            return;
        }
        let now = now();
        match (self.stage, self.since) {
            (Stage::Holds, _) | (_, None) => {
                let (paces, holds) = (self.paces, self.holds);
                *self = Self { paces, since: Some(now), holds, ..Self::default() };
            }
            (Stage::Measures { ended }, Some(since)) => {
                let shortest = if self.paces { &mut self.paced } else { &mut self.unpaced };
                *shortest = (*shortest).min(now.saturating_duration_since(since));
                self.since = Some(now);
                self.left = WINDOW;
                self.paces = !self.paces;
                self.stage = Stage::Measures { ended: ended + 1 };
                if ended + 1 == WINDOWS {
                    self.decide();
                }
            }
        }
    }

    fn decide(&mut self) {
        let paces = self.paced < self.unpaced;
        let longer = self.holds.saturating_mul(2).min(MOST_HOLDS);
        self.holds = if paces == self.paces { longer } else { HOLDS };
        self.paces = paces;
        self.left = self.holds;
        self.stage = Stage::Holds;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client whose batches, paced and not, have a size and take a time in microseconds.
    struct Client {
        trial: Trial,
        now: Instant,
    }

    impl Client {
        fn new() -> Self {
            Self { trial: Trial::default(), now: Instant::now() }
        }

        /// The share of `requests` that are in paced batches, in percent.
        fn paced(&mut self, requests: usize, paced: (usize, u64), unpaced: (usize, u64)) -> usize {
            let (mut sent, mut sent_paced) = (0, 0);
            while sent < requests {
                let (count, time) = if self.trial.paces() { paced } else { unpaced };
                self.now += Duration::from_micros(time);
                sent += count;
                sent_paced += if self.trial.paces() { count } else { 0 };
                self.trial.after_batch(count, || self.now);
            }
            sent_paced * 100 / requests.max(1)
        }
    }

    #[test]
    fn a_client_that_is_faster_without_pauses_has_hardly_any() {
        let mut client = Client::new();
        assert!(client.paced(1_000_000, (7, 40), (4, 12)) < 2);
    }

    #[test]
    fn a_client_that_is_faster_with_pauses_keeps_them() {
        let mut client = Client::new();
        assert!(client.paced(1_000_000, (7, 42), (2, 13)) > 98);
    }

    #[test]
    fn a_client_that_changes_is_found_out() {
        let mut client = Client::new();
        client.paced(4_000_000, (7, 40), (4, 12));
        // The next trial is at most this far away.
        client.paced(MOST_HOLDS as usize + 8192, (7, 42), (2, 13));
        assert!(client.paced(100_000, (7, 42), (2, 13)) > 95);
    }

    #[test]
    fn one_interruption_does_not_decide() {
        for interrupted in 0..WINDOWS {
            let mut client = Client::new();
            client.paced((WINDOW * interrupted) as usize, (8, 40), (4, 12));
            client.now += Duration::from_secs(1);
            client.paced(10_000, (8, 40), (4, 12));
            assert!(!client.trial.paces(), "in window {interrupted}");
        }
    }

    #[test]
    fn the_clock_is_read_once_in_a_window() {
        let mut trial = Trial::default();
        let mut reads = 0;
        for _ in 0..1_000_000 {
            trial.after_batch(1, || {
                reads += 1;
                Instant::now()
            });
        }
        assert!((1..200).contains(&reads), "{reads}");
    }
}
