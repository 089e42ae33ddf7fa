//! The progress of `copy`: a bar on a terminal, lines elsewhere.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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
                let lines = Lines { total: total.unwrap_or_default(), done: AtomicU64::new(0) };
                Self::Lines(Arc::new(lines))
            }
        }
    }

    /// Counts bytes that are done.
    pub(crate) fn add(&self, bytes: u64) {
        match self {
            Self::Hidden => {}
            Self::Bar(bar) => bar.inc(bytes),
            Self::Lines(lines) => {
                if let Some(line) = lines.add(bytes) {
                    // A standard error that is closed is no reason to fail.
                    let _ = writeln!(io::stderr(), "{line}");
                }
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
    /// Counts; returns the line to write if a step was completed.
    fn add(&self, bytes: u64) -> Option<String> {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        let after = before.saturating_add(bytes);
        if self.total == 0 {
            let is_step = before / STEP_BYTES != after / STEP_BYTES;
            return is_step.then(|| rounded(after));
        }
        let percent = |done: u64| (u128::from(done) * 100 / u128::from(self.total)) as u64;
        let step = percent(after) / STEP_PERCENT * STEP_PERCENT;
        (percent(before) < step)
            .then(|| format!("{step} %  {} of {}", rounded(after), rounded(self.total)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_one_line() {
        let lines = Lines { total: 1000, done: AtomicU64::new(0) };
        let written: Vec<_> = (0..1000).filter_map(|_| lines.add(1)).collect();
        assert_eq!(written.len(), 20);
        assert_eq!(written[0], "5 %  50 bytes of 1000 bytes");
        assert_eq!(written[19], "100 %  1000 bytes of 1000 bytes");
    }

    #[test]
    fn large_steps_skip_lines() {
        let lines = Lines { total: u64::MAX, done: AtomicU64::new(0) };
        assert_eq!(lines.add(u64::MAX), Some("100 %  16.0 EiB of 16.0 EiB".to_owned()));
        assert_eq!(lines.add(1), None);
    }

    #[test]
    fn without_a_total_bytes_are_counted() {
        let lines = Lines { total: 0, done: AtomicU64::new(0) };
        assert_eq!(lines.add(STEP_BYTES - 1), None);
        assert_eq!(lines.add(1), Some("1.0 GiB".to_owned()));
    }
}
