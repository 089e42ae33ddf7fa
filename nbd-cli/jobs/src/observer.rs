//! Information from a running job.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use imgfmt::jobs::RateLimit;

use crate::cancellation::Cancellation;
use crate::text::{printable, without_error_numbers};

/// The phase of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// The disk is copied.
    Copying,
    /// Both sides are read again and compared.
    Verifying,
    /// The disk is read.
    Reading,
}

/// The progress of a job. Sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The phase; each phase counts from its own start.
    pub phase: Phase,
    /// Bytes done. The number decreases when a part has to be copied again.
    pub done: u64,
    /// Bytes of these that were known to be zero.
    pub holes: u64,
    /// Total bytes, if known beforehand.
    pub total: Option<u64>,
}

/// An event of a file with a temporary name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TemporaryFile {
    /// The file was created. It is useless until the job is complete: a process that exits without
    /// waiting for the job should remove it.
    Made,
    /// The file has its final name, was removed, or will be kept.
    Gone,
}

/// Receives information from a job. Every method has a default that does nothing or calls another
/// one.
///
/// The tasks of the job call the methods, which have to return soon. Calls of
/// [`progress`](Self::progress) come one at a time and in order.
pub trait Observer: Send + Sync {
    /// The job made progress.
    fn progress(&self, _progress: &Progress) {}

    /// A warning for the user, in one sentence. The job continues.
    fn warning(&self, _text: &str) {}

    /// A part of the source could not be read, and is zero in the destination; `why` is a sentence.
    fn unreadable(&self, start: u64, length: u64, why: &str) {
        self.warning(&format!(
            "{length} bytes at offset {start} of the source cannot be read, and are zero in the \
             destination: {why}"
        ));
    }

    /// A file cannot be locked, because its file system has no locks. May be called more than once
    /// for one file.
    fn unlocked(&self, path: &Path) {
        self.warning(&format!(
            "the file system of '{}' has no locks, so nothing keeps other programs from writing to it \
             at the same time",
            printable(&path.to_string_lossy())
        ));
    }

    /// The image of an export could not be closed, so that something of it, such as its bitmaps, is
    /// not stored; the log says why.
    fn close_failed(&self) {}

    /// A file with a temporary name was created or is gone.
    fn temporary_file(&self, _path: &Path, _event: TemporaryFile) {}
}

/// An observer that ignores everything.
#[derive(Clone, Copy, Debug, Default)]
struct Silent;

impl Observer for Silent {}

/// The caller's side of a job: the observer, the cancellation and a limit of the rate. By default
/// nothing is observed, cancelled or limited. Cheap to clone.
#[derive(Clone)]
pub struct JobContext {
    /// Receives progress and warnings.
    pub observer: Arc<dyn Observer>,
    /// Cancels the job.
    pub cancellation: Cancellation,
    /// Limits the data that the job reads from its source. By default nothing does.
    pub rate_limit: Option<RateLimit>,
}

impl Default for JobContext {
    fn default() -> Self {
        Self { observer: Arc::new(Silent), cancellation: Cancellation::new(), rate_limit: None }
    }
}

impl JobContext {
    /// Returns the context for a job of [`imgfmt::jobs`]: the same observer, which sees the
    /// progress of the phase [`Phase::Copying`], the same cancellation and the same limit.
    #[must_use]
    pub fn for_images(&self) -> imgfmt::jobs::JobContext {
        let observer = Arc::new(ImageObserver(Arc::clone(&self.observer)));
        let (cancellation, rate_limit) =
            (self.cancellation.of_image_jobs(), self.rate_limit.clone());
        imgfmt::jobs::JobContext { observer, cancellation, rate_limit }
    }
}

/// Passes the progress of a job of the image engine on.
struct ImageObserver(Arc<dyn Observer>);

impl imgfmt::jobs::Observer for ImageObserver {
    fn progress(&self, progress: &imgfmt::jobs::Progress) {
        self.0.progress(&Progress {
            phase: Phase::Copying,
            done: progress.done,
            holes: progress.holes,
            total: Some(progress.total),
        });
    }

    fn unreadable(&self, range: imgfmt::GuestRange, error: &imgfmt::Error) {
        let why = without_error_numbers(error.to_string());
        self.0.unreadable(range.offset().bytes(), range.length(), &why);
    }
}

impl std::fmt::Debug for JobContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobContext")
            .field("cancellation", &self.cancellation)
            .field("rate_limit", &self.rate_limit)
            .finish_non_exhaustive()
    }
}

impl JobContext {
    /// Waits until `bytes` may be read.
    pub(crate) async fn keep_rate(&self, bytes: u64) {
        let wait = self.rate_limit.as_ref().map_or(Duration::ZERO, |limit| limit.reserve(bytes));
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

/// Counts completed bytes and informs the observer.
pub(crate) struct Meter {
    observer: Arc<dyn Observer>,
    /// Held during the call of the observer, so that calls come in order.
    progress: Mutex<Progress>,
}

impl Meter {
    /// Starts a phase; `done` bytes of it are complete already.
    pub(crate) fn begin(context: &JobContext, phase: Phase, total: Option<u64>, done: u64) -> Self {
        let progress = Progress { phase, done, holes: 0, total };
        context.observer.progress(&progress);
        Self { observer: context.observer.clone(), progress: Mutex::new(progress) }
    }

    /// Adds completed bytes, and the number of those that were known to be zero.
    pub(crate) fn add(&self, bytes: u64, holes: u64) {
        self.change(|progress| {
            progress.done = progress.done.saturating_add(bytes);
            progress.holes = progress.holes.saturating_add(holes);
        });
    }

    /// Subtracts bytes that have to be copied again.
    pub(crate) fn set_back(&self, bytes: u64) {
        self.change(|progress| {
            progress.done = progress.done.saturating_sub(bytes);
            progress.holes = progress.holes.min(progress.done);
        });
    }

    /// Returns the progress.
    pub(crate) fn progress(&self) -> Progress {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut progress);
        self.observer.progress(&progress);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Notes(Mutex<Vec<(u64, u64)>>);

    impl Observer for Notes {
        fn progress(&self, progress: &Progress) {
            self.0.lock().unwrap().push((progress.done, progress.holes));
        }
    }

    #[test]
    fn progress_of_many_tasks_comes_in_order() {
        let notes = Arc::new(Notes::default());
        let context = JobContext { observer: notes.clone(), ..JobContext::default() };
        let meter = Meter::begin(&context, Phase::Copying, Some(800), 0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| meter.add(2, 1)));
            }
        });
        let expected: Vec<_> = (0..=400).map(|step| (2 * step, step)).collect();
        assert_eq!(*notes.0.lock().unwrap(), expected);
    }

    #[test]
    fn what_is_done_again_is_taken_back() {
        let meter = Meter::begin(&JobContext::default(), Phase::Copying, None, 10);
        meter.add(90, 80);
        meter.set_back(60);
        assert_eq!((meter.progress().done, meter.progress().holes), (40, 40));
    }
}
