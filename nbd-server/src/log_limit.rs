//! Limits warnings that clients can cause, so that none fills the log.

use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Instant;

/// Warnings at once.
const BURST: u64 = 100;
/// Time until another one is allowed after these, in milliseconds.
const PAUSE: u64 = 1000;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);
static WARNINGS: Mutex<Limit> = Mutex::new(Limit { free: 0, left_out: 0 });

struct Limit {
    /// The time at which a warning is free after all that were allowed, in milliseconds.
    free: u64,
    /// Since the last that was allowed.
    left_out: u64,
}

impl Limit {
    /// Whether a warning is allowed at `now`, and if so, the number that was left out before.
    fn allow(&mut self, now: u64) -> Option<u64> {
        let free = self.free.max(now);
        if free - now > (BURST - 1) * PAUSE {
            self.left_out += 1;
            return None;
        }
        self.free = free + PAUSE;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Returns whether a warning may be logged that a client has caused.
pub(crate) fn may_warn() -> bool {
    let now = u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX / 2);
    let allowed = WARNINGS.lock().unwrap_or_else(PoisonError::into_inner).allow(now);
    if let Some(left_out @ 1..) = allowed {
        tracing::warn!(left_out, "there were more warnings about clients than the log is to hold");
    }
    allowed.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_burst_there_is_a_warning_now_and_then_and_the_others_are_counted() {
        let mut limit = Limit { free: 0, left_out: 0 };
        assert!((0..BURST).all(|_| limit.allow(5) == Some(0)));
        assert_eq!([5, 6, 7].map(|now| limit.allow(now)), [None; 3]);
        assert_eq!(limit.allow(5 + PAUSE), Some(3));
        assert_eq!(limit.allow(5 + PAUSE), None);
        let later = 1_000_000;
        assert_eq!(limit.allow(later), Some(1));
        assert!((1..BURST).all(|_| limit.allow(later) == Some(0)));
        assert_eq!(limit.allow(later), None);
    }
}
