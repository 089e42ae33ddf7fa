//! Letting the system report more ends of writes before the thread takes them.
//!
//! A thread of the system reports the ends of direct writes one by one, on the core that the disk
//! interrupts. If the thread of the ring is on the same core, it is woken by the first one and runs
//! at once, because its time slice is short: then each write costs two changes of threads and an
//! answer of its own. So it yields the core first. Programs that compute would keep it for
//! milliseconds: where that happens, it does not yield for a while.

use std::time::{Duration, Instant};

/// A yield that takes longer has let a program compute. The ends of 64 writes are reported in less.
const LONG: Duration = Duration::from_micros(300);
/// Groups of results that are taken at once after that.
const PAUSE: u32 = 1000;

/// Whether the thread yields.
#[derive(Debug, Default)]
pub(super) struct Yielding {
    /// Groups of results until it does again.
    pause: u32,
}

impl Yielding {
    /// Yields the core if `more` ends are about to be reported; returns whether it did.
    pub(super) fn before_results(&mut self, more: bool) -> bool {
        self.run(more, || {
            let start = Instant::now();
            std::thread::yield_now();
            start.elapsed()
        })
    }

    fn run(&mut self, more: bool, yield_core: impl FnOnce() -> Duration) -> bool {
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        if more && yield_core() > LONG {
            self.pause = PAUSE;
        }
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_core_is_yielded_for_more_results_until_another_program_keeps_it() {
        let mut yielding = Yielding::default();
        let mut yields = |count: u32, more, takes| {
            let mut yields = 0;
            for _ in 0..count {
                yielding.run(more, || {
                    yields += 1;
                    takes
                });
            }
            yields
        };
        assert_eq!(yields(10, true, LONG), 10);
        assert_eq!(yields(10, false, LONG), 0, "nothing is to come");
        assert_eq!(yields(1, true, LONG * 2), 1);
        assert_eq!(yields(PAUSE, true, LONG), 0);
        assert_eq!(yields(10, true, LONG), 10, "and again later");
    }
}
