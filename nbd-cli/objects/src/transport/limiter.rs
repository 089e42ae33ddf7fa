//! The limit of requests per second.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Spaces requests evenly.
#[derive(Debug)]
pub(super) struct Limiter {
    /// Between two requests.
    distance: Option<Duration>,
    /// When the next request may begin.
    next: Mutex<Option<Instant>>,
}

impl Limiter {
    /// Allows this many requests each second, or any number.
    pub(super) fn new(per_second: Option<u32>) -> Self {
        let distance = per_second.map(|count| Duration::from_secs(1) / count.max(1));
        Self { distance, next: Mutex::default() }
    }

    /// Waits for the turn of a request. A caller that stops waiting leaves its turn unused.
    pub(super) async fn wait(&self) {
        let Some(distance) = self.distance else { return };
        let turn = self.turn(distance, Instant::now());
        sleep_until(turn).await;
    }

    fn turn(&self, distance: Duration, now: Instant) -> Instant {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = next.unwrap_or(now).max(now);
        *next = Some(turn + distance);
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_a_distance_apart_and_unused_ones_are_not_saved_up() {
        let (limiter, distance) = (Limiter::new(Some(10)), Duration::from_millis(100));
        let start = Instant::now();
        assert_eq!(limiter.turn(distance, start), start);
        assert_eq!(limiter.turn(distance, start), start + distance);
        let later = start + 50 * distance;
        assert_eq!(limiter.turn(distance, later), later);
        assert_eq!(limiter.turn(distance, later), later + distance);
    }
}
