//! Ending a job early.

use std::sync::{Arc, OnceLock};

use super::error::{JobError, JobErrorKind};

/// Ends jobs early: clones are one and the same, so that a job can be given one and the caller keeps
/// another. Once it is cancelled it stays so.
///
/// A cancelled job stops between two steps and fails with [`JobErrorKind::Interrupted`].
#[derive(Clone, Debug, Default)]
pub struct Cancellation {
    reason: Arc<OnceLock<String>>,
}

impl Cancellation {
    /// One that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels. The first reason counts: it is what the job's error says, such as `interrupted by
    /// SIGINT`.
    pub fn cancel(&self, reason: impl Into<String>) {
        self.reason.get_or_init(|| reason.into());
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.reason.get().is_some()
    }

    /// The error of a job that ends because it was cancelled; to be asked between two steps.
    ///
    /// # Errors
    ///
    /// `Interrupted`, if it was.
    pub fn check(&self) -> Result<(), JobError> {
        match self.reason.get() {
            None => Ok(()),
            Some(reason) => Err(JobError::new(JobErrorKind::Interrupted, reason)),
        }
    }
}
