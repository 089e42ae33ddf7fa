//! The progress bar of `copy`.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Whether a progress bar is drawn.
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
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar for `total` bytes, or a counter if that is not known.
    pub(crate) fn new(visibility: Visibility, total: Option<u64>) -> Self {
        let shown = match visibility {
            Visibility::Always => true,
            Visibility::Never => false,
            Visibility::IfTerminal => io::stderr().is_terminal(),
        };
        if !shown {
            return Self { bar: ProgressBar::hidden() };
        }
        let target = ProgressDrawTarget::stderr_with_hz(10);
        let bar = ProgressBar::with_draw_target(total, target);
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
        Self { bar }
    }

    /// Counts bytes that are done.
    pub(crate) fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// Removes the bar.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}
