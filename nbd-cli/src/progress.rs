//! The progress of `copy`: a bar on a terminal, lines elsewhere.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::size::rounded;

/// Whether progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Visibility {
    /// If standard error is a terminal.
    IfTerminal,
    /// In any case.
    Always,
    /// In no case.
    Never,
}

/// What the command line says about progress.
#[derive(Clone, Copy, Debug, Args)]
pub struct ProgressArgs {
    /// Show progress even if standard error is no terminal.
    #[arg(short, long)]
    pub progress: bool,

    /// Show no progress.
    #[arg(short, long, conflicts_with = "progress")]
    pub quiet: bool,
}

impl ProgressArgs {
    pub(crate) fn visibility(self) -> Visibility {
        match (self.progress, self.quiet) {
            (true, _) => Visibility::Always,
            (_, true) => Visibility::Never,
            _ => Visibility::IfTerminal,
        }
    }
}

/// Shows how far a copy is; cheap to clone and to update from many tasks.
#[derive(Clone, Debug)]
pub(crate) enum Progress {
    Hidden,
    /// Redrawn in place, with rate and time left.
    Bar(ProgressBar),
    /// One line per step, for logs.
    Lines(Arc<Lines>),
}

/// Counts up to `total`.
#[derive(Debug)]
pub(crate) struct Lines {
    total: u64,
    done: AtomicU64,
    /// The last step that was written. Held while its line is written: of two tasks that each
    /// complete a step the slower one must not write an older line below a newer one.
    written: Mutex<u64>,
}

/// A line is written each time so many percent are done, or so many bytes if the total is unknown.
const STEP_PERCENT: u64 = 5;
const STEP_BYTES: u64 = 1 << 30;

impl Progress {
    /// Progress towards `total` bytes, or a mere count if that is not known.
    pub(crate) fn new(visibility: Visibility, total: Option<u64>) -> Self {
        match (visibility, io::stderr().is_terminal()) {
            (Visibility::Never, _) | (Visibility::IfTerminal, false) => Self::Hidden,
            (_, true) => Self::Bar(bar(total)),
            (Visibility::Always, false) => {
                Self::Lines(Arc::new(Lines::new(total.unwrap_or_default())))
            }
        }
    }

    /// Counts bytes that are done.
    pub(crate) fn add(&self, bytes: u64) {
        match self {
            Self::Hidden => {}
            Self::Bar(bar) => bar.inc(bytes),
            // A standard error that is closed is no reason to fail.
            Self::Lines(lines) => lines.add(bytes, |line| {
                let _ = writeln!(io::stderr(), "{line}");
            }),
        }
    }

    /// Takes bytes back that have to be done again.
    pub(crate) fn set_back(&self, bytes: u64) {
        match self {
            Self::Hidden => {}
            Self::Bar(bar) => bar.dec(bytes),
            Self::Lines(lines) => {
                lines.done.fetch_sub(bytes, Ordering::Relaxed);
            }
        }
    }

    /// Removes the bar.
    pub(crate) fn clear(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn bar(total: Option<u64>) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
    let template = match total {
        Some(_) => {
            "{bar:30} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  \
             {binary_bytes_per_sec}  {eta} left"
        }
        None => "{spinner} {binary_bytes}  {binary_bytes_per_sec}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

impl Lines {
    const fn new(total: u64) -> Self {
        Self { total, done: AtomicU64::new(0), written: Mutex::new(0) }
    }

    /// Counts; writes a line if that completed a step.
    fn add(&self, bytes: u64, write: impl FnOnce(&str)) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.step(before) == self.step(before.saturating_add(bytes)) {
            return;
        }
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        // What others have counted meanwhile belongs into this line, which is then theirs as well.
        let done = self.done.load(Ordering::Relaxed);
        let step = self.step(done);
        if step <= *written {
            return;
        }
        *written = step;
        if self.total == 0 {
            write(&rounded(done));
        } else {
            let percent = step * STEP_PERCENT;
            write(&format!("{percent} %  {} of {}", rounded(done), rounded(self.total)));
        }
    }

    /// How many steps are complete when `done` bytes are.
    fn step(&self, done: u64) -> u64 {
        match self.total {
            0 => done / STEP_BYTES,
            total => (u128::from(done) * 100 / u128::from(total)) as u64 / STEP_PERCENT,
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
        let lines = Lines::new(1000);
        let written: Vec<_> = (0..1000).filter_map(|_| add(&lines, 1)).collect();
        assert_eq!(written.len(), 20);
        assert_eq!(written[0], "5 %  50 bytes of 1000 bytes");
        assert_eq!(written[19], "100 %  1000 bytes of 1000 bytes");
    }

    #[test]
    fn large_steps_skip_lines() {
        let lines = Lines::new(u64::MAX);
        assert_eq!(add(&lines, u64::MAX), Some("100 %  16.0 EiB of 16.0 EiB".to_owned()));
        assert_eq!(add(&lines, 0), None);
    }

    #[test]
    fn without_a_total_bytes_are_counted() {
        let lines = Lines::new(0);
        assert_eq!(add(&lines, STEP_BYTES - 1), None);
        assert_eq!(add(&lines, 1), Some("1.0 GiB".to_owned()));
    }

    #[test]
    fn lines_of_many_threads_come_in_order_and_the_last_one_is_the_end() {
        for _ in 0..200 {
            let (lines, written) = (Lines::new(8000), Mutex::new(Vec::new()));
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        for _ in 0..20 {
                            lines.add(100, |line| {
                                let percent = line.split_once(' ').map(|(percent, _)| percent);
                                let percent = percent.and_then(|text| text.parse::<u64>().ok());
                                written
                                    .lock()
                                    .unwrap_or_else(PoisonError::into_inner)
                                    .push(percent);
                            });
                        }
                    });
                }
            });
            let written = written.into_inner().unwrap_or_else(PoisonError::into_inner);
            assert!(written.is_sorted(), "{written:?}");
            assert_eq!(written.last(), Some(&Some(100)));
        }
    }
}
