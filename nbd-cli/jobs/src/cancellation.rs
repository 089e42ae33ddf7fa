//! Cancels jobs.

use tokio::sync::watch::{Sender, channel};

use crate::error::{JobError, JobErrorKind};

/// Cancels jobs. Clones share one state, so that a job can own one and the caller keeps another.
/// Cancellation is permanent.
///
/// A cancelled job stops between two steps, removes the file that it was making, and fails with
/// [`JobErrorKind::Interrupted`].
#[derive(Clone, Debug)]
pub struct Cancellation {
    reason: Sender<Option<String>>,
    image_jobs: imgfmt::jobs::Cancellation,
}

impl Cancellation {
    /// Creates a value that is not cancelled.
    pub fn new() -> Self {
        Self { reason: channel(None).0, image_jobs: imgfmt::jobs::Cancellation::new() }
    }

    /// Cancels. The first reason is kept: it is the text of the job's error, such as `interrupted
    /// by SIGINT`.
    pub fn cancel(&self, reason: impl Into<String>) {
        self.reason.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                let reason = reason.into();
                self.image_jobs.cancel(reason.clone());
                *first = Some(reason);
            }
            is_first
        });
    }

    /// Returns the cancellation of jobs of [`imgfmt::jobs`], which end together with those of this
    /// crate.
    pub fn of_image_jobs(&self) -> imgfmt::jobs::Cancellation {
        self.image_jobs.clone()
    }

    /// Returns whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.reason.borrow().is_some()
    }

    /// Waits for the cancellation; returns the error of a job that ends for it.
    ///
    /// # Cancel safety
    ///
    /// Safe.
    pub async fn cancelled(&self) -> JobError {
        let mut reasons = self.reason.subscribe();
        let reason = reasons.wait_for(Option::is_some).await.map(|reason| reason.clone());
        // It cannot fail: this value owns the sender.
        let Ok(reason) = reason else { return std::future::pending().await };
        JobError::new(JobErrorKind::Interrupted, reason.unwrap_or_default())
    }

    /// Runs work that may be abandoned at any moment, such as waiting for a server.
    ///
    /// # Errors
    ///
    /// The error of the work, or [`JobErrorKind::Interrupted`] if it was cancelled before the work
    /// was done.
    ///
    /// # Cancel safety
    ///
    /// That of the work.
    pub async fn unless_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, JobError>>,
    ) -> Result<T, JobError> {
        tokio::select! {
            // A cancellation may be what made the work fail.
            result = work => match result {
                Err(_) if self.is_cancelled() => Err(self.cancelled().await),
                result => result,
            },
            cancelled = self.cancelled() => Err(cancelled),
        }
    }
}

impl Default for Cancellation {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_ends_with_the_first_reason() {
        let cancellation = Cancellation::new();
        let other = cancellation.clone();
        let waiting = tokio::spawn(async move {
            other.unless_cancelled(std::future::pending::<Result<(), JobError>>()).await
        });
        cancellation.cancel("interrupted by SIGINT");
        cancellation.cancel("interrupted by SIGTERM");
        let error = waiting.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), JobErrorKind::Interrupted);
        assert_eq!(error.to_string(), "interrupted by SIGINT");
        assert!(cancellation.is_cancelled());
        let of_image_jobs = cancellation.of_image_jobs().check().unwrap_err();
        assert_eq!(of_image_jobs.to_string(), "interrupted by SIGINT");
    }

    #[tokio::test]
    async fn work_that_fails_because_it_was_cancelled_ends_with_that_reason() {
        for _ in 0..32 {
            let cancellation = Cancellation::new();
            cancellation.cancel("interrupted by SIGTERM");
            let work = std::future::ready(Err::<(), _>(JobError::source("the image was closed")));
            let error = cancellation.unless_cancelled(work).await.unwrap_err();
            assert_eq!(error.to_string(), "interrupted by SIGTERM");
        }
    }

    #[tokio::test]
    async fn without_a_reason_the_work_decides() {
        let done = Cancellation::new().unless_cancelled(async { Ok(7) }).await;
        assert_eq!(done.unwrap(), 7);
    }
}
