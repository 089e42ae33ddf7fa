//! Waits briefly for images that another process is about to release.

use std::time::{Duration, Instant};

use super::error::OpenError;

/// Time to wait for an image in use: a server that was told to end completes its requests first,
/// and its successor is often started right away.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);

/// Opens an image, and retries for a moment if another process uses it.
///
/// # Errors
///
/// Those of `open`.
pub(super) fn when_free<T>(mut open: impl FnMut() -> Result<T, OpenError>) -> Result<T, OpenError> {
    let start = Instant::now();
    loop {
        match open() {
            Err(error) if error.is_busy() && start.elapsed() < PATIENCE => {
                tracing::debug!(%error, "waiting for an image");
                std::thread::sleep(PAUSE);
            }
            outcome => return outcome,
        }
    }
}
