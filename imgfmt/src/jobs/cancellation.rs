//! Cancels jobs.

use std::sync::{Arc, OnceLock};

use super::error::{JobError, JobErrorKind};

/// Cancels jobs. Clones share one state, so that a job can own one and the caller keeps another.
/// Cancellation is permanent.
///
/// A cancelled job stops between two steps and fails with [`JobErrorKind::Interrupted`].
#[derive(Clone, Debug, Default)]
pub struct Cancellation {
    reason: Arc<OnceLock<String>>,
}

impl Cancellation {
    /// Creates a value that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels. The first reason is kept: it is the text of the job's error, such as `interrupted
    /// by SIGINT`.
    pub fn cancel(&self, reason: impl Into<String>) {
        self.reason.get_or_init(|| reason.into());
    }

    /// Returns whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.reason.get().is_some()
    }

    /// Returns the error of a cancelled job; called between two steps.
    ///
    /// # Errors
    ///
    /// `Interrupted`, if it was cancelled.
    pub fn check(&self) -> Result<(), JobError> {
        match self.reason.get() {
            None => Ok(()),
            Some(reason) => Err(JobError::new(JobErrorKind::Interrupted, reason)),
        }
    }
}
