//! SIGUSR1, with which the caller of a long command asks how far it is.

use std::sync::atomic::{AtomicBool, Ordering};

use nbd_jobs::tasks;
use rustix::process::Signal as Number;

use super::Caught;
use crate::error::CommandError;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Starts to note the signal, which otherwise kills the process.
///
/// # Errors
///
/// If the system refuses to catch it.
pub(crate) fn watch_requests() -> Result<(), CommandError> {
    let failed = |error| CommandError::new(format!("cannot catch SIGUSR1: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(failed)?;
    let mut caught = tasks::block_on(&runtime, async { Caught::new([Number::USR1]) })?;
    let watching = tasks::start_thread("requests", move || {
        loop {
            tasks::block_on(&runtime, caught.next());
            REQUESTED.store(true, Ordering::Relaxed);
        }
    });
    watching.map(drop).map_err(failed)
}

/// Returns whether the signal came since the last call.
pub(crate) fn was_requested() -> bool {
    REQUESTED.load(Ordering::Relaxed) && REQUESTED.swap(false, Ordering::Relaxed)
}
