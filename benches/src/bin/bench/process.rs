//! The cost of a server: CPU time and peak memory of its process and all descendants.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// The unit of CPU times in `/proc`: Linux has shown them in hundredths of a second to every
/// program since 2.6, whatever the kernel's own clock.
const TICK_US: u64 = 10_000;

/// Interval of sampling the memory. Servers that fork lose the memory of their children when those
/// end, so a single sample at the end would miss it.
const MEMORY_INTERVAL: Duration = Duration::from_millis(250);

/// The resources that a server used during one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// User and system time in microseconds.
    pub(crate) cpu_us: u64,
    /// Sum of the peak resident sizes of all its processes in KiB. Pages that forked processes
    /// share are counted in each.
    pub(crate) peak_memory_kib: u64,
}

/// Watches a process and its descendants from its start to [`Watch::finish`].
#[derive(Debug)]
pub(crate) struct Watch {
    root: u32,
    cpu_us_before: u64,
    peak_memory_kib: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to watch the process `root`.
    ///
    /// # Errors
    ///
    /// There is no such process.
    pub(crate) fn start(root: u32) -> Result<Self> {
        let cpu_us_before = tree_cpu_us(root)?;
        let peak_memory_kib = Arc::new(AtomicU64::new(0));
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let peak = Arc::clone(&peak_memory_kib);
            let is_over = Arc::clone(&is_over);
            move || {
                // Short-lived processes are sampled early, too.
                let mut interval = MEMORY_INTERVAL / 16;
                while !is_over.load(Ordering::Relaxed) {
                    thread::park_timeout(interval);
                    interval = MEMORY_INTERVAL;
                    peak.fetch_max(tree_memory_kib(root), Ordering::Relaxed);
                }
            }
        });
        Ok(Self { root, cpu_us_before, peak_memory_kib, is_over, thread: Some(thread) })
    }

    /// Returns the resources used since the start.
    ///
    /// # Errors
    ///
    /// The process is gone.
    pub(crate) fn finish(mut self) -> Result<Usage> {
        self.stop();
        let cpu_us_after = tree_cpu_us(self.root).context("the server ended during the block")?;
        Ok(Usage {
            cpu_us: cpu_us_after.saturating_sub(self.cpu_us_before),
            peak_memory_kib: self.peak_memory_kib.load(Ordering::Relaxed),
        })
    }

    fn stop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The thread only fails if reading /proc panics, and then the peak is merely too low.
            drop(thread.join());
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs `command` to its end; returns its duration and resources. Its output is discarded.
///
/// # Errors
///
/// The command cannot be started or fails; its complaint is in the error.
pub(crate) fn run_to_end(command: &mut Command) -> Result<(Duration, Usage)> {
    let name = command.get_program().to_string_lossy().into_owned();
    // Children that have ended and were waited for are counted as ours.
    let before = tree_cpu_us(std::process::id())?;
    let start = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let watch = Watch::start(child.id());
    let output = child.wait_with_output()?;
    let elapsed = start.elapsed();
    let peak_memory_kib = watch.map_or(0, |mut watch| {
        watch.stop();
        watch.peak_memory_kib.load(Ordering::Relaxed)
    });
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{name}: {}: {}", output.status, complaint.trim());
    }
    let cpu_us = tree_cpu_us(std::process::id())?.saturating_sub(before);
    Ok((elapsed, Usage { cpu_us, peak_memory_kib }))
}

/// The fields of `/proc/PID/stat` that are used here.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    parent: u32,
    /// User and system time of the process with all its threads, and of its children that have
    /// ended and were waited for, in ticks.
    ticks: u64,
}

/// Parses `/proc/PID/stat` (proc(5)). The name in parentheses can contain anything.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(')')?;
    // The first field behind the name is field 3, the state.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).copied();
    let mut ticks = 0_u64;
    for number in 14..=17 {
        let value: u64 = field(number)?.parse().ok()?;
        ticks = ticks.checked_add(value)?;
    }
    Some(Stat { parent: field(4)?.parse().ok()?, ticks })
}

/// The value of `VmHWM` in `/proc/PID/status`, in KiB.
fn parse_peak_memory(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Every process with its parent and CPU time. Processes that end meanwhile are left out.
fn all_processes() -> Vec<(u32, Stat)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let id: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let text = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
            Some((id, parse_stat(&text)?))
        })
        .collect()
}

/// `root` and its descendants among `processes`, each with its CPU time in ticks.
fn tree(root: u32, processes: &[(u32, Stat)]) -> Vec<(u32, u64)> {
    let mut found: Vec<(u32, u64)> = processes
        .iter()
        .filter(|(id, _)| *id == root)
        .map(|(id, stat)| (*id, stat.ticks))
        .collect();
    let mut next = 0;
    while let Some(&(parent, _)) = found.get(next) {
        next += 1;
        let children = processes.iter().filter(|(id, stat)| stat.parent == parent && *id != root);
        found.extend(children.map(|(id, stat)| (*id, stat.ticks)));
    }
    found
}

/// The children of a process, their children and so on.
pub(crate) fn descendants(root: u32) -> Vec<u32> {
    let members = tree(root, &all_processes());
    members.into_iter().map(|(id, _)| id).filter(|id| *id != root).collect()
}

fn tree_cpu_us(root: u32) -> Result<u64> {
    let members = tree(root, &all_processes());
    if members.is_empty() {
        return Err(anyhow!("process {root} does not exist"));
    }
    Ok(members.iter().map(|(_, ticks)| ticks * TICK_US).sum())
}

fn tree_memory_kib(root: u32) -> u64 {
    tree(root, &all_processes())
        .iter()
        .filter_map(|(id, _)| fs::read_to_string(format!("/proc/{id}/status")).ok())
        .filter_map(|status| parse_peak_memory(&status))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_parsed_whatever_the_name() {
        let text = "4293 (a) b (c) S 17 4293 4293 0 -1 4194368 133 252 0 0 25 1 35 165 20 0 1 0 49";
        assert_eq!(parse_stat(text), Some(Stat { parent: 17, ticks: 25 + 1 + 35 + 165 }));
    }

    #[test]
    fn cut_off_stat_is_no_stat() {
        for text in ["", "1 (a", "1 (a) S", "1 (a) S 1 2 3 4 5 6 7 8 9 10 11", "1 (a) S x 1"] {
            assert_eq!(parse_stat(text), None, "{text}");
        }
    }

    #[test]
    fn peak_memory_is_found_among_the_lines() {
        let status = "Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t    4232 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(parse_peak_memory(status), Some(4232));
        assert_eq!(parse_peak_memory("Name:\tkthread\n"), None);
    }

    #[test]
    fn descendants_belong_to_the_tree_and_strangers_do_not() {
        let stat = |parent, ticks| Stat { parent, ticks };
        let processes = [
            (1, stat(0, 1)),
            (10, stat(1, 2)),
            (11, stat(10, 4)),
            (12, stat(11, 8)),
            (13, stat(1, 16)),
        ];
        assert_eq!(tree(10, &processes), [(10, 2), (11, 4), (12, 8)]);
        assert!(tree(99, &processes).is_empty());
    }

    #[test]
    fn own_process_has_memory_and_its_work_is_counted() {
        let watch = Watch::start(std::process::id()).expect("own process");
        let mut sum = 0_u64;
        let deadline = Instant::now() + Duration::from_millis(200);
        while Instant::now() < deadline {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let usage = watch.finish().expect("own process");
        assert!(usage.peak_memory_kib > 0, "{usage:?}");
        assert!(usage.cpu_us > 0, "{usage:?}");
    }
}
