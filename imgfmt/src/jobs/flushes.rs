//! Flushes an image beside the job that writes to it.

use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use super::error::JobError;
use crate::error::Error;
use crate::image::Image;

/// The time after which what was written is flushed: a crash costs what was written since then. Not
/// sooner, because the flush takes processor time from the job.
const PERIOD: Duration = Duration::from_secs(3);

/// The flushes of a job, one at a time, each on a thread.
#[derive(Debug)]
pub(super) struct Flushes<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    image: &'env Image,
    running: Option<ScopedJoinHandle<'scope, Result<(), Error>>>,
    /// When the last flush began.
    began: Instant,
    /// Whether something has changed since then.
    is_changed: bool,
}

impl<'scope, 'env> Flushes<'scope, 'env> {
    pub(super) fn new(scope: &'scope Scope<'scope, 'env>, image: &'env Image) -> Self {
        let began = Instant::now();
        Self { scope, image, running: None, began, is_changed: false }
    }

    /// The image has changed. Starts a flush if it is time for one.
    ///
    /// # Errors
    ///
    /// `Destination`: the last flush has failed.
    pub(super) fn changed(&mut self) -> Result<(), JobError> {
        self.is_changed = true;
        self.flush_if_due()
    }

    /// Starts a flush if something has changed and it is time for that.
    ///
    /// # Errors
    ///
    /// `Destination`: the last flush has failed.
    pub(super) fn flush_if_due(&mut self) -> Result<(), JobError> {
        if self.running.as_ref().is_some_and(ScopedJoinHandle::is_finished) {
            self.wait()?;
        }
        let is_due = self.began.elapsed() >= PERIOD;
        if !self.is_changed || !is_due || self.running.is_some() {
            return Ok(());
        }
        (self.began, self.is_changed) = (Instant::now(), false);
        let image = self.image;
        let thread = Builder::new().name("flush".to_owned());
        match thread.spawn_scoped(self.scope, || image.flush()) {
            Ok(running) => {
                self.running = Some(running);
                Ok(())
            }
            // There are too many threads: the job waits.
            Err(_) => self.image.flush().map_err(|error| self.failed(error)),
        }
    }

    /// Waits for a flush that is running.
    fn wait(&mut self) -> Result<(), JobError> {
        let Some(running) = self.running.take() else { return Ok(()) };
        let flushed = running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        flushed.map_err(|error| self.failed(error))
    }

    fn failed(&mut self, error: Error) -> JobError {
        self.is_changed = true;
        JobError::destination(error)
    }

    /// Ends a job with this outcome. After an error, what was written is flushed.
    ///
    /// # Errors
    ///
    /// The job's; otherwise `Destination`, if a flush that was running has failed.
    pub(super) fn end<T>(mut self, outcome: Result<T, JobError>) -> Result<T, JobError> {
        let flushed = self.wait();
        let outcome = outcome.and_then(|value| flushed.map(|()| value));
        if outcome.is_err() && self.is_changed {
            // The first error is the one to be told; without this flush, a crash would only cost
            // more.
            let _ = self.image.flush();
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::error::JobErrorKind;
    use super::*;
    use crate::storage::MemoryStorage;
    use crate::testing::{Call, FailingStorage, Fault};
    use crate::{Access, Format, OpenOptions};

    const EIO: i32 = 5;

    fn image() -> (Arc<FailingStorage>, Image) {
        let storage = FailingStorage::new(Arc::new(MemoryStorage::new(4096)));
        let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
        let image = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
        (storage, image)
    }

    fn wait_until(holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < Duration::from_secs(60), "this takes too long");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// When a flush began after which it is time for the next one.
    fn long_ago() -> Instant {
        Instant::now().checked_sub(PERIOD).unwrap()
    }

    #[test]
    fn a_job_goes_on_while_its_data_is_flushed() {
        let (storage, image) = image();
        let calls = storage.calls();
        storage.hold(Call::Sync, 0..1);
        std::thread::scope(|scope| {
            let mut flushes = Flushes::new(scope, &image);
            // However slow this is, it is not the time.
            flushes.began += Duration::from_secs(3600);
            flushes.changed().unwrap();
            assert!(flushes.running.is_none(), "it is not time");
            flushes.began = long_ago();
            flushes.flush_if_due().unwrap();
            wait_until(|| storage.held() == 1);
            // None waits for it, and there is one at a time.
            flushes.began = long_ago();
            flushes.changed().unwrap();
            assert_eq!(storage.calls(), calls + 1);
            storage.release();
            wait_until(|| flushes.running.as_ref().unwrap().is_finished());
            // What changed meanwhile is flushed then.
            flushes.flush_if_due().unwrap();
            flushes.end(Ok(())).unwrap();
        });
        assert_eq!(storage.calls(), calls + 2);
    }

    #[test]
    fn a_little_that_has_changed_is_flushed_in_time() {
        let (storage, image) = image();
        let calls = storage.calls();
        std::thread::scope(|scope| {
            let mut flushes = Flushes::new(scope, &image);
            flushes.began = long_ago();
            flushes.flush_if_due().unwrap();
            assert!(flushes.running.is_none(), "nothing has changed");
            flushes.changed().unwrap();
            flushes.end(Ok(())).unwrap();
        });
        assert_eq!(storage.calls(), calls + 1);
    }

    #[test]
    fn a_failed_flush_ends_the_job_and_is_tried_once_more() {
        for is_noticed in [true, false] {
            let (storage, image) = image();
            let calls = storage.calls();
            storage.set_fault(Some(Fault { calls: calls..calls + 1, code: EIO }));
            let error = std::thread::scope(|scope| {
                let mut flushes = Flushes::new(scope, &image);
                flushes.began = long_ago();
                flushes.changed().unwrap();
                let outcome = is_noticed.then(|| {
                    wait_until(|| flushes.running.as_ref().unwrap().is_finished());
                    flushes.flush_if_due()
                });
                flushes.end(outcome.unwrap_or(Ok(()))).unwrap_err()
            });
            assert_eq!(error.kind(), JobErrorKind::Destination);
            assert_eq!(storage.calls(), calls + 2);
        }
    }
}
