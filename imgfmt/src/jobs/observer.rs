//! What a job tells its caller while it runs.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::cancellation::Cancellation;

/// How far a job is. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// How much is done.
    pub done: u64,
    /// How much of that was known to be zero.
    pub holes: u64,
    /// How much there is.
    pub total: u64,
}

/// Takes what a job tells. Every method has a default that does nothing.
///
/// The methods are called by the threads of the job, and have to return soon. Calls of
/// [`progress`](Self::progress) come one at a time and in order.
pub trait Observer: Send + Sync {
    /// The job has come this far.
    fn progress(&self, _progress: &Progress) {}
}

/// An observer that takes nothing.
struct Silent;

impl Observer for Silent {}

/// The caller's side of a job: who is told, and what ends it early. By default nobody is told, and
/// nothing ends it. Cheap to clone.
#[derive(Clone)]
pub struct JobContext {
    /// Is told what happens.
    pub observer: Arc<dyn Observer>,
    /// Ends the job early.
    pub cancellation: Cancellation,
}

impl Default for JobContext {
    fn default() -> Self {
        Self { observer: Arc::new(Silent), cancellation: Cancellation::new() }
    }
}

impl fmt::Debug for JobContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobContext")
            .field("cancellation", &self.cancellation)
            .finish_non_exhaustive()
    }
}

/// Counts what is done and tells the observer.
pub(super) struct Meter<'a> {
    observer: &'a dyn Observer,
    /// Held while the observer is told, so that it hears of it in order.
    progress: Mutex<Progress>,
}

impl<'a> Meter<'a> {
    pub(super) fn begin(context: &'a JobContext, total: u64) -> Self {
        let progress = Progress { done: 0, holes: 0, total };
        context.observer.progress(&progress);
        Self { observer: &*context.observer, progress: Mutex::new(progress) }
    }

    /// Counts bytes that are done.
    pub(super) fn add(&self, bytes: u64) {
        self.count(bytes, 0);
    }

    /// Counts bytes that are done and were known to be zero.
    pub(super) fn add_hole(&self, bytes: u64) {
        self.count(bytes, bytes);
    }

    /// How far it is.
    pub(super) fn progress(&self) -> Progress {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, bytes: u64, holes: u64) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.done = progress.done.saturating_add(bytes);
        progress.holes = progress.holes.saturating_add(holes);
        self.observer.progress(&progress);
    }
}
