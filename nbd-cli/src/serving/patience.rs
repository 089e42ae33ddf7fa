//! Images that another process is about to let go of.

use std::time::{Duration, Instant};

use super::image::OpenError;

/// How long an image that is in use is waited for: a server that was told to end finishes its
/// requests first, and whoever told it starts the next one right away.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);

/// Opens something, and tries again for a moment if another process has it.
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
