//! The program's side of jobs: their output goes to standard error, and signals cancel them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nbd_jobs::{JobContext, Observer, Phase, TemporaryFile};

use crate::locking::warn_of_no_locks;
use crate::output::warn;
use crate::progress::{Progress, Visibility};
use crate::signals;

/// Whether this process could not close an image of an export.
static CLOSE_FAILED: AtomicBool = AtomicBool::new(false);

/// Returns whether this process could not close an image of an export, which its exit status says.
pub(crate) fn a_close_failed() -> bool {
    CLOSE_FAILED.load(Ordering::Acquire)
}

/// Shows the progress of a job, and its warnings.
pub(crate) struct Shown {
    visibility: Visibility,
    progress: Mutex<Option<(Phase, Progress)>>,
}

impl Shown {
    /// Creates an observer that shows warnings, and progress as `visibility` says.
    pub(crate) fn new(visibility: Visibility) -> Arc<Self> {
        Arc::new(Self { visibility, progress: Mutex::new(None) })
    }

    /// The context of the job.
    pub(crate) fn context(self: &Arc<Self>) -> JobContext {
        JobContext {
            observer: self.clone(),
            cancellation: signals::cancellation(),
            ..JobContext::default()
        }
    }

    /// Ends at the total, with a summary.
    pub(crate) fn finish(&self) {
        if let Some((_, progress)) = self.current().take() {
            progress.finish();
        }
    }

    /// Removes the bar: the command reports its result itself.
    pub(crate) fn clear(&self) {
        if let Some((_, progress)) = self.current().take() {
            progress.clear();
        }
    }

    /// Shows the progress of a phase; a new phase starts at zero. Calls must be sequential.
    fn show(&self, phase: Phase, total: Option<u64>, done: u64, holes: u64) {
        let mut shown = self.current();
        if shown.as_ref().is_none_or(|(former, _)| *former != phase) {
            let new = Progress::new(self.visibility, total);
            if let Some((_, former)) = shown.replace((phase, new)) {
                former.clear();
            }
        }
        if let Some((_, shown)) = &*shown {
            shown.set(done, holes);
        }
    }

    fn current(&self) -> MutexGuard<'_, Option<(Phase, Progress)>> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shows warnings only.
pub(crate) fn warnings() -> Arc<dyn Observer> {
    Shown::new(Visibility::Never)
}

impl Observer for Shown {
    fn progress(&self, progress: &nbd_jobs::Progress) {
        self.show(progress.phase, progress.total, progress.done, progress.holes);
    }

    fn warning(&self, text: &str) {
        warn(text);
    }

    fn unlocked(&self, path: &Path) {
        warn_of_no_locks(path);
    }

    fn close_failed(&self) {
        CLOSE_FAILED.store(true, Ordering::Release);
    }

    fn temporary_file(&self, path: &Path, event: TemporaryFile) {
        signals::note_temporary_file(path, event);
    }
}
