//! Writes to a file, one thread at a time.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use imgfmt::{Durability, HostOffset, Storage};
use tokio::sync::Semaphore;

use crate::error::JobError;
use crate::lanes;

/// Lets one thread at a time write to a file: the file admits no more, and the kernel would let the
/// others spin.
#[derive(Debug)]
pub(crate) struct Writer {
    /// Locked during a write.
    file: Arc<Mutex<()>>,
    /// Keeps threads that may block from waiting for the file.
    queue: Semaphore,
}

impl Default for Writer {
    fn default() -> Self {
        Self { file: Arc::default(), queue: Semaphore::new(1) }
    }
}

impl Writer {
    /// Writes data.
    ///
    /// # Errors
    ///
    /// `Err` if the thread ended, `Ok(Err)` with an error of the storage.
    pub(super) async fn write(
        &self,
        storage: Arc<dyn Storage>,
        offset: u64,
        data: Bytes,
    ) -> Result<io::Result<()>, JobError> {
        let at = HostOffset::new(offset);
        self.alone(move || storage.write_at(at, &data, Durability::Cached)).await
    }

    /// Carries out other work on the file.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub(super) async fn alone(
        &self,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<io::Result<()>, JobError> {
        // A lane waits in place: its other tasks would only fill more memory meanwhile.
        let _turn = if lanes::is_lane() { None } else { self.queue.acquire().await.ok() };
        let file = self.file.clone();
        let alone = move || {
            let _held = file.lock().unwrap_or_else(PoisonError::into_inner);
            work()
        };
        lanes::blocking(alone).await.map_err(|error| JobError::given_up("write", &error))
    }
}
