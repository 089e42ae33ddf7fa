//! Waiting a moment for the rest of a burst.
//!
//! A client with a deep queue submits its requests one by one. Answering the first before the
//! second has arrived makes both sides wake each other for every single request, and that costs
//! more than the requests. So, while a client keeps several requests in flight, the server looks
//! again for a few microseconds before it begins: until the burst has its usual size, or nothing
//! came for a while. A client with one request in flight is never made to wait.

use std::time::Duration;

/// Without a byte for this long, a burst is over. Longer than a client takes between two
/// submissions.
const GAP: Duration = Duration::from_micros(5);
/// No burst is waited for longer than this.
const LONGEST: Duration = Duration::from_micros(60);
/// Every so many bursts the usual size is measured again.
const MEASURE_EVERY: u32 = 16;

/// What one connection's bursts look like.
#[derive(Debug, Default)]
pub(super) struct Gather {
    /// Bytes of the last burst that ended by itself.
    usual_len: usize,
    bursts: u32,
}

/// Whether to look for more bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    LookAgain,
    Enough,
}

impl Gather {
    /// Is it worth waiting at all, when `requests` were answered since the last burst?
    pub(super) fn begin(&mut self, requests: usize) -> Verdict {
        if requests < 2 {
            self.usual_len = 0;
            return Verdict::Enough;
        }
        self.bursts = self.bursts.wrapping_add(1);
        if self.bursts.is_multiple_of(MEASURE_EVERY) {
            self.usual_len = 0;
        }
        Verdict::LookAgain
    }

    /// `len` bytes have come, the last of them `quiet` ago, the first `elapsed` ago.
    pub(super) fn look(&mut self, len: usize, quiet: Duration, elapsed: Duration) -> Verdict {
        if self.usual_len > 0 && len >= self.usual_len {
            return Verdict::Enough;
        }
        if quiet >= GAP || elapsed >= LONGEST {
            self.usual_len = len;
            return Verdict::Enough;
        }
        Verdict::LookAgain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    #[test]
    fn a_single_request_is_never_held_back() {
        assert_eq!(Gather::default().begin(0), Verdict::Enough);
        assert_eq!(Gather::default().begin(1), Verdict::Enough);
    }

    #[test]
    fn a_burst_ends_by_silence_and_the_next_of_its_size_at_once() {
        let mut gather = Gather::default();
        assert_eq!(gather.begin(2), Verdict::LookAgain);
        assert_eq!(gather.look(28, NOW, NOW), Verdict::LookAgain);
        assert_eq!(gather.look(448, GAP, GAP), Verdict::Enough);
        assert_eq!(gather.begin(16), Verdict::LookAgain);
        assert_eq!(gather.look(420, NOW, NOW), Verdict::LookAgain);
        assert_eq!(gather.look(448, NOW, NOW), Verdict::Enough);
    }

    #[test]
    fn a_growing_burst_is_noticed() {
        let mut gather = Gather::default();
        gather.begin(2);
        gather.look(56, GAP, GAP);
        for _ in 0..MEASURE_EVERY {
            gather.begin(2);
        }
        assert_eq!(gather.look(56, NOW, NOW), Verdict::LookAgain, "the usual size is open again");
    }

    #[test]
    fn a_client_that_never_pauses_is_answered_all_the_same() {
        let mut gather = Gather::default();
        gather.begin(100);
        assert_eq!(gather.look(1 << 20, NOW, LONGEST), Verdict::Enough);
    }
}
