//! Information from a running job.

use std::fmt;
use std::sync::Arc;

use super::cancellation::Cancellation;
use super::error::JobError;
use super::rate_limit::RateLimit;
use crate::error::Error;
use crate::ordered_lock::{OrderedMutex, rank};
use crate::units::GuestRange;

/// The progress of a job. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes of these that were known to be zero.
    pub holes: u64,
    /// Total bytes.
    pub total: u64,
}

/// Receives information from a job. Every method has a default that does nothing.
///
/// The threads of the job call the methods, which have to return soon. Calls of
/// [`progress`](Self::progress) come one at a time and in order.
pub trait Observer: Send + Sync {
    /// The job made progress.
    fn progress(&self, _progress: &Progress) {}

    /// A stream has given an overlay content of its own in a part of the disk, or in some of it.
    fn copied(&self, _range: GuestRange) {}

    /// A part of the source could not be read, and is zero in the destination.
    fn unreadable(&self, _range: GuestRange, _error: &Error) {}
}

/// An observer that ignores everything.
struct Silent;

impl Observer for Silent {}

/// The caller's side of a job: the observer, the cancellation and a limit of the rate. By default
/// nothing is observed, cancelled or limited. Cheap to clone.
#[derive(Clone)]
pub struct JobContext {
    /// Receives progress.
    pub observer: Arc<dyn Observer>,
    /// Cancels the job.
    pub cancellation: Cancellation,
    /// Limits the rate at which a conversion or a commit transfers data. `None`, the default, is no
    /// limit.
    pub rate_limit: Option<RateLimit>,
}

impl Default for JobContext {
    fn default() -> Self {
        Self { observer: Arc::new(Silent), cancellation: Cancellation::new(), rate_limit: None }
    }
}

impl fmt::Debug for JobContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobContext")
            .field("cancellation", &self.cancellation)
            .field("rate_limit", &self.rate_limit)
            .finish_non_exhaustive()
    }
}

impl JobContext {
    /// Blocks until `bytes` may be transferred, or until `is_over` returns true.
    pub(super) fn keep_rate(&self, bytes: u64, is_over: impl Fn() -> bool) -> Result<(), JobError> {
        match &self.rate_limit {
            Some(limit) => limit.wait(bytes, &self.cancellation, is_over),
            None => Ok(()),
        }
    }
}

/// Counts what is done and tells the observer.
pub(super) struct Meter<'a> {
    observer: &'a dyn Observer,
    /// Held while the observer is called, so that calls are in order.
    progress: OrderedMutex<{ rank::PROGRESS }, Progress>,
}

impl<'a> Meter<'a> {
    pub(super) fn begin(context: &'a JobContext, total: u64) -> Self {
        let progress = Progress { done: 0, holes: 0, total };
        context.observer.progress(&progress);
        Self { observer: &*context.observer, progress: OrderedMutex::new(progress) }
    }

    /// Counts bytes that are done.
    pub(super) fn add(&self, bytes: u64) {
        self.count(bytes, 0);
    }

    /// Counts bytes that are done and were known to be zero.
    pub(super) fn add_hole(&self, bytes: u64) {
        self.count(bytes, bytes);
    }

    /// The progress so far.
    pub(super) fn progress(&self) -> Progress {
        *self.progress.lock()
    }

    fn count(&self, bytes: u64, holes: u64) {
        let mut progress = self.progress.lock();
        progress.done = progress.done.saturating_add(bytes);
        progress.holes = progress.holes.saturating_add(holes);
        self.observer.progress(&progress);
    }
}
