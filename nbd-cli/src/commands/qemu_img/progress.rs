//! Progress with `-p`, and on SIGUSR1.

use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nbd_jobs::{JobContext, Observer, TemporaryFile};

use super::arguments::Arguments;
use super::known::Opt;
use super::refusal::{Refusal, complain};
use crate::signals;

/// Shows percentages in the form that callers parse: on standard output with `-p`, each over the
/// one before; otherwise on standard error when SIGUSR1 asks.
pub(super) struct Percentage {
    is_shown: bool,
    /// Whether warnings of unreadable parts are left out.
    is_quiet: bool,
    /// The last that was shown.
    shown: Mutex<Option<f64>>,
}

impl Percentage {
    /// Starts at 0 % if progress is wanted.
    ///
    /// # Errors
    ///
    /// If the system refuses to catch SIGUSR1.
    pub(super) fn begin(is_wanted: bool) -> Result<Arc<Self>, Refusal> {
        Self::begin_as(is_wanted, false)
    }

    /// Starts at 0 % if `-p` is given, and is silent about unreadable parts if `-q` is.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    pub(super) fn begin_for(arguments: &Arguments) -> Result<Arc<Self>, Refusal> {
        Self::begin_as(arguments.wants_progress(), arguments.has(Opt::Quiet))
    }

    fn begin_as(is_shown: bool, is_quiet: bool) -> Result<Arc<Self>, Refusal> {
        signals::watch_requests()?;
        let new = Self { is_shown, is_quiet, shown: Mutex::new(None) };
        new.show(0.0);
        Ok(Arc::new(new))
    }

    /// The context of the job.
    pub(super) fn context(self: &Arc<Self>) -> JobContext {
        JobContext {
            observer: self.clone(),
            cancellation: signals::cancellation(),
            ..JobContext::default()
        }
    }

    /// Ends the line, at 100 % if the job has succeeded.
    pub(super) fn end_with<T, E>(&self, result: &Result<T, E>) {
        if result.is_ok() {
            self.complete();
        }
        self.end();
    }

    /// Shows 100 %.
    pub(super) fn complete(&self) {
        if self.is_shown {
            print("    (100.00/100%)\r");
        }
    }

    /// Ends the line.
    pub(super) fn end(&self) {
        if self.is_shown {
            print("\n");
        }
    }

    fn show(&self, percent: f64) {
        if !self.is_shown {
            return;
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.is_none_or(|before| percent - before >= 1.0) {
            *shown = Some(percent);
            print(&format!("    ({percent:.2}/100%)\r"));
        }
    }
}

/// Errors are ignored: progress is not a result.
fn print(text: &str) {
    let mut output = std::io::stdout().lock();
    let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
}

impl Observer for Percentage {
    fn progress(&self, progress: &nbd_jobs::Progress) {
        let percent = match progress.total {
            None | Some(0) => 0.0,
            Some(total) => progress.done as f64 * 100.0 / total as f64,
        };
        self.show(percent);
        if signals::was_requested() && !self.is_shown {
            // There is no remedy for a closed standard error.
            let _ = writeln!(std::io::stderr(), "    ({percent:.2}/100%)");
        }
    }

    fn warning(&self, text: &str) {
        complain(&format!("warning: {text}"));
    }

    fn unreadable(&self, start: u64, length: u64, why: &str) {
        if !self.is_quiet {
            complain(&format!(
                "warning: error while reading offset {start}: {why}; {length} bytes are zero in the \
                 target"
            ));
        }
    }

    fn unlocked(&self, _: &Path) {}

    fn temporary_file(&self, path: &Path, event: TemporaryFile) {
        signals::note_temporary_file(path, event);
    }
}
