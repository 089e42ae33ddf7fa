//! CPU time of this process and of the server's.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// CPU time that this process has used, all threads together.
pub(super) fn own() -> Duration {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(used.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(used.tv_nsec).unwrap_or(0))
}

/// Another process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    started: u64,
}

impl Process {
    /// The process with this number, if it can be examined.
    pub(super) fn find(pid: u32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (started, _) = parse(&text)?;
        Some(Self { pid, started })
    }

    /// CPU time that it has used, in steps of a clock tick (10 ms almost everywhere); `None` once
    /// it has ended.
    pub(super) fn used(&self) -> Option<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        let (started, ticks) = parse(&text)?;
        let per_second = rustix::param::clock_ticks_per_second().max(1);
        let nanoseconds = u128::from(ticks) * 1_000_000_000 / u128::from(per_second);
        let used = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        (started == self.started).then_some(used)
    }
}

/// The start time of a process, and the ticks it has used; see proc_pid_stat(5).
fn parse(text: &str) -> Option<(u64, u64)> {
    // The name of the program, in parentheses, may hold anything.
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let started = fields.nth(6)?.parse().ok()?;
    Some((started, user.saturating_add(system)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_after_any_name() {
        let text = "77 (a) b (c) S 1 77 77 0 -1 4194560 1 2 3 4 150 50 7 8 20 0 9 0 4242 1000 5\n";
        assert_eq!(parse(text), Some((4242, 200)));
        for cut in ["", "77", "77 (a", "77 (a) S 1 2"] {
            assert_eq!(parse(cut), None, "{cut:?}");
        }
    }

    #[test]
    fn this_process_is_seen_to_work() {
        let process = Process::find(std::process::id()).expect("it runs");
        let (before, own_before) = (process.used().expect("it runs"), own());
        let mut sum = 0_u64;
        while own() - own_before < Duration::from_millis(50) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(process.used().expect("it runs") > before);
        assert!(Process::find(u32::MAX).is_none());
    }
}
