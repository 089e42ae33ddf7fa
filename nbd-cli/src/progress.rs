//! The progress of `copy`: a bar on a terminal, lines elsewhere.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Write as _};
use std::num::NonZeroU64;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use imgfmt::jobs::RateLimit;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nbd_jobs::chart::CharacterSet;
use nbd_jobs::size::{parse_rate, rounded};
use nbd_jobs::text::without_error_numbers;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::output::ReportFormat;
use crate::terminal::{character_set, columns_of};

/// Whether progress is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Visibility {
    /// If standard error is a terminal.
    IfTerminal,
    /// Always.
    Always,
    /// Never.
    Never,
    /// Always, for a program: lines of the form `N/100`, written to this file.
    Numbers(&'static File),
}

impl Visibility {
    const fn of_flags(progress: bool, quiet: bool) -> Self {
        match (progress, quiet) {
            (true, _) => Self::Always,
            (_, true) => Self::Never,
            _ => Self::IfTerminal,
        }
    }
}

/// The progress options.
#[derive(Clone, Copy, Debug, Args)]
pub struct ProgressArgs {
    /// Show progress even if standard error is not a terminal; with a file descriptor, write lines
    /// such as 42/100 to it instead.
    #[arg(
        short,
        long,
        value_name = "FD",
        num_args = 0..=1,
        require_equals = true,
        value_parser = open_descriptor
    )]
    pub progress: Option<Option<&'static File>>,

    /// Show no progress.
    #[arg(short, long, conflicts_with = "progress")]
    pub quiet: bool,
}

impl ProgressArgs {
    pub(crate) fn visibility(self) -> Visibility {
        match self.progress {
            Some(Some(file)) => Visibility::Numbers(file),
            shown => Visibility::of_flags(shown.is_some(), self.quiet),
        }
    }
}

/// Opens a file descriptor again, while the command line is parsed: later the number may be that of
/// a file of this program. The file is open as long as the process.
fn open_descriptor(text: &str) -> Result<&'static File, String> {
    let number: u32 = text.parse().map_err(|_| "give the number of a file descriptor")?;
    // Opening a pipe without a reader would wait for one otherwise.
    let waitless = (OFlags::NONBLOCK | OFlags::APPEND).bits().cast_signed();
    let file = OpenOptions::new()
        .append(true)
        .custom_flags(waitless)
        .open(format!("/proc/self/fd/{number}"))
        .and_then(|file| Ok(fcntl_setfl(&file, OFlags::APPEND).map(|()| file)?))
        .or_else(|error| match Errno::from_io_error(&error) {
            // A socket, which cannot be opened, or a pipe in a directory that nobody reads.
            Some(Errno::NXIO) => Ok(duplicate(number)?),
            _ => Err(error),
        });
    let file = file.map_err(|error| {
        without_error_numbers(format!("nothing can be written to this file descriptor: {error}"))
    })?;
    Ok(Box::leak(Box::new(file)))
}

/// Returns another descriptor of an open file.
fn duplicate(number: u32) -> Result<File, Errno> {
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    let number = i32::try_from(number).map_err(|_| Errno::BADF)?;
    pidfd_getfd(own, number, PidfdGetfdFlags::empty()).map(File::from)
}

/// The option that limits the rate of a command.
#[derive(Clone, Copy, Debug, Args)]
pub struct RateArgs {
    /// Read at most this much per second, such as 50M; zeroes that need not be read do not count.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub rate: Option<NonZeroU64>,
}

impl RateArgs {
    pub(crate) fn limit(self) -> Option<RateLimit> {
        self.rate.map(RateLimit::new)
    }
}

/// The options of a command that ends with a summary.
#[derive(Clone, Copy, Debug, Args)]
pub struct SummaryArgs {
    /// Print the summary as JSON.
    #[arg(long)]
    pub json: bool,

    /// Show progress even if standard error is not a terminal.
    #[arg(short, long)]
    pub progress: bool,

    /// Show no progress and no summary.
    #[arg(short, long, conflicts_with_all = ["progress", "json"])]
    pub quiet: bool,
}

impl SummaryArgs {
    pub(crate) fn visibility(self) -> Visibility {
        Visibility::of_flags(self.progress, self.quiet)
    }

    /// Returns the form of the summary, if one is to be printed.
    pub(crate) fn format(self) -> Option<ReportFormat> {
        (!self.quiet).then(|| ReportFormat::from_json_flag(self.json))
    }
}

/// Shows the progress of a copy; cheap to clone and to update from many tasks.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    shown: Shown,
    tally: Arc<Tally>,
}

#[derive(Clone, Debug)]
enum Shown {
    Nothing,
    /// Redrawn in place, with rate and remaining time.
    Bar(ProgressBar),
    /// One line per step, for logs.
    Lines(Arc<Lines>),
}

/// The contents of the summary.
#[derive(Debug)]
struct Tally {
    began: Instant,
    done: AtomicU64,
    holes: AtomicU64,
}

/// Counts up to `total`.
#[derive(Debug)]
pub(crate) struct Lines {
    total: u64,
    done: AtomicU64,
    /// A program's file, which gets a number for each percent.
    numbers: Option<&'static File>,
    /// The last step that was written. Held while its line is written: of two tasks that each
    /// complete a step, the slower one must not write an older line after a newer one.
    written: Mutex<u64>,
}

/// Interval of lines in percent, or in bytes if the total is unknown.
const STEP_PERCENT: u64 = 5;
const STEP_BYTES: u64 = 1 << 30;

impl Progress {
    /// Creates progress towards `total` bytes, or a plain count if that is unknown.
    pub(crate) fn new(visibility: Visibility, total: Option<u64>) -> Self {
        let lines = |numbers| {
            let lines = Lines::new(total.unwrap_or_default(), numbers);
            Shown::Lines(Arc::new(lines))
        };
        let shown = match (visibility, io::stderr().is_terminal()) {
            (Visibility::Never, _) | (Visibility::IfTerminal, false) => Shown::Nothing,
            (Visibility::Numbers(file), _) => {
                say_to(Some(file), "0/100");
                lines(Some(file))
            }
            (_, true) => Shown::Bar(bar(total)),
            (Visibility::Always, false) => lines(None),
        };
        let (done, holes) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { shown, tally: Arc::new(Tally { began: Instant::now(), done, holes }) }
    }

    /// Adds completed bytes.
    pub(crate) fn add(&self, bytes: u64) {
        self.tally.done.fetch_add(bytes, Ordering::Relaxed);
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => bar.inc(bytes),
            Shown::Lines(lines) => lines.add(bytes, |line| say_to(lines.numbers, line)),
        }
    }

    /// Sets the completed bytes, and the number of those that were known to be zero. Calls must
    /// come one at a time.
    pub(crate) fn set(&self, done: u64, holes: u64) {
        let before = self.tally.done.load(Ordering::Relaxed);
        match done.checked_sub(before) {
            Some(more) => self.add(more),
            None => self.set_back(before - done),
        }
        self.tally.holes.store(holes, Ordering::Relaxed);
    }

    /// Subtracts bytes that have to be copied again.
    pub(crate) fn set_back(&self, bytes: u64) {
        let done = self.tally.done.fetch_sub(bytes, Ordering::Relaxed).saturating_sub(bytes);
        self.tally.holes.fetch_min(done, Ordering::Relaxed);
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => bar.dec(bytes),
            Shown::Lines(lines) => {
                lines.done.fetch_sub(bytes, Ordering::Relaxed);
            }
        }
    }

    /// Removes the bar: the command reports its result itself.
    pub(crate) fn clear(&self) {
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => bar.finish_and_clear(),
            Shown::Lines(lines) => lines.write_end_if_there(|line| say_to(lines.numbers, line)),
        }
    }

    /// Ends at the total, with a summary.
    pub(crate) fn finish(&self) {
        let summary = || {
            let [done, holes] =
                [&self.tally.done, &self.tally.holes].map(|count| count.load(Ordering::Relaxed));
            summary(done, holes, self.tally.began.elapsed())
        };
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                bar.finish();
                // The bar leaves the cursor at its end.
                say_to(None, &format!("\n{}", summary()));
            }
            Shown::Lines(lines) => {
                lines.write_end(|line| say_to(lines.numbers, line));
                if lines.numbers.is_none() {
                    say_to(None, &summary());
                }
            }
        }
    }
}

/// Writes a line to a program's file or to standard error. That nobody reads it is not an error.
fn say_to(file: Option<&File>, line: &str) {
    let line = format!("{line}\n");
    let _ = match file {
        Some(mut file) => file.write_all(line.as_bytes()),
        None => io::stderr().write_all(line.as_bytes()),
    };
}

fn summary(done: u64, holes: u64, took: Duration) -> String {
    // A rate over a shorter time is meaningless.
    let seconds = took.as_secs_f64().max(0.001);
    let rate = rounded((done as f64 / seconds) as u64);
    let (data, holes) = (rounded(done.saturating_sub(holes)), rounded(holes));
    format!("{} in {seconds:.1} s, {rate}/s: {data} data, {holes} holes", rounded(done))
}

/// The minimum number of columns for all figures, and for rate and time.
const WIDE: usize = 72;
const MEDIUM: usize = 44;

fn bar(total: Option<u64>) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
    // As wide as the terminal. A line that is longer would become several.
    let template = match (total, columns_of(io::stderr())) {
        (Some(_), WIDE..) => {
            "{wide_bar} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  \
             {binary_bytes_per_sec}  {eta} left"
        }
        (Some(_), MEDIUM..) => "{wide_bar} {percent:>3} %  {binary_bytes_per_sec}  {eta} left",
        (Some(_), _) => "{wide_bar} {percent:>3} %",
        (None, _) => "{spinner} {binary_bytes}  {binary_bytes_per_sec}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(match character_set() {
            CharacterSet::Unicode => style,
            CharacterSet::Ascii => style.progress_chars("#> ").tick_chars("|/-\\ "),
        });
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

impl Lines {
    const fn new(total: u64, numbers: Option<&'static File>) -> Self {
        Self { total, done: AtomicU64::new(0), numbers, written: Mutex::new(0) }
    }

    /// The interval of lines, in percent.
    const fn step_percent(&self) -> u64 {
        if self.numbers.is_some() { 1 } else { STEP_PERCENT }
    }

    /// Adds bytes; writes a line if that completed a step.
    fn add(&self, bytes: u64, write: impl FnOnce(&str)) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.step(before) == self.step(before.saturating_add(bytes)) {
            return;
        }
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        // Bytes that other tasks have added in the meantime are part of this line.
        let done = self.done.load(Ordering::Relaxed);
        let step = self.step(done);
        if step <= *written {
            return;
        }
        *written = step;
        let percent = step * self.step_percent();
        match (self.numbers, self.total) {
            (Some(_), 0) => {}
            (None, 0) => write(&rounded(done)),
            // The last line is written at the end.
            _ if percent >= 100 => {}
            (Some(_), _) => write(&format!("{percent}/100")),
            (None, total) => {
                write(&format!("{percent} %  {} of {}", rounded(done), rounded(total)));
            }
        }
    }

    /// Writes the last line if everything is complete.
    fn write_end_if_there(&self, write: impl FnOnce(&str)) {
        if self.done.load(Ordering::Relaxed) >= self.total {
            self.write_end(write);
        }
    }

    /// Writes the last line, if the total is known.
    fn write_end(&self, write: impl FnOnce(&str)) {
        if self.numbers.is_some() {
            write("100/100");
        } else if self.total > 0 {
            write(&format!("100 %  {0} of {0}", rounded(self.total)));
        }
    }

    /// Returns the number of steps that are complete after `done` bytes.
    fn step(&self, done: u64) -> u64 {
        match self.total {
            0 => done / STEP_BYTES,
            total => (u128::from(done) * 100 / u128::from(total)) as u64 / self.step_percent(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn add(lines: &Lines, bytes: u64) -> Option<String> {
        let mut written = None;
        lines.add(bytes, |line| written = Some(line.to_owned()));
        written
    }

    #[test]
    fn each_step_is_one_line() {
        let lines = Lines::new(1000, None);
        let written: Vec<_> = (0..1000).filter_map(|_| add(&lines, 1)).collect();
        assert_eq!(written.len(), 19);
        assert_eq!(written[0], "5 %  50 bytes of 1000 bytes");
        assert_eq!(written[18], "95 %  950 bytes of 1000 bytes");
        lines.write_end(|line| assert_eq!(line, "100 %  1000 bytes of 1000 bytes"));
    }

    #[test]
    fn large_steps_skip_lines() {
        let lines = Lines::new(u64::MAX, None);
        assert_eq!(add(&lines, u64::MAX / 2), Some("45 %  8.0 EiB of 16.0 EiB".to_owned()));
        assert_eq!(add(&lines, u64::MAX / 2), Some("95 %  16.0 EiB of 16.0 EiB".to_owned()));
        assert_eq!(add(&lines, 0), None);
    }

    #[test]
    fn the_summary_tells_bytes_time_rate_data_and_holes() {
        let text = summary(8 << 20, 6 << 20, Duration::from_secs(2));
        assert_eq!(text, "8.0 MiB in 2.0 s, 4.0 MiB/s: 2.0 MiB data, 6.0 MiB holes");
        assert!(summary(0, 0, Duration::ZERO).starts_with("0 bytes in 0.0 s"));
    }

    #[test]
    fn without_a_total_bytes_are_counted() {
        let lines = Lines::new(0, None);
        assert_eq!(add(&lines, STEP_BYTES - 1), None);
        assert_eq!(add(&lines, 1), Some("1.0 GiB".to_owned()));
    }

    #[test]
    fn lines_of_many_threads_come_in_order_and_the_last_one_is_the_end() {
        for _ in 0..200 {
            let (lines, written) = (Lines::new(8000, None), Mutex::new(Vec::new()));
            let note = |line: &str| {
                let percent = line.split_once(' ').map(|(percent, _)| percent);
                let percent = percent.and_then(|text| text.parse::<u64>().ok());
                written.lock().unwrap_or_else(PoisonError::into_inner).push(percent);
            };
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        for _ in 0..20 {
                            lines.add(100, note);
                        }
                    });
                }
            });
            lines.write_end(note);
            let written = written.into_inner().unwrap_or_else(PoisonError::into_inner);
            assert!(written.is_sorted(), "{written:?}");
            assert_eq!(written.last(), Some(&Some(100)));
        }
    }
}
