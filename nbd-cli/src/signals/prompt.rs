//! Signals while a passphrase is typed: the terminal shows again what is typed before the process
//! ends.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock, PoisonError};

use nbd_jobs::tasks;
use rustix::process::Signal as Number;

use super::{ARE_CAUGHT, Caught, EndSignal, REQUESTS, was_ignored};

type Restore = Box<dyn Fn() + Send>;

/// What restores the terminal that is in use.
static RESTORE: Mutex<Option<Restore>> = Mutex::new(None);
static IS_WATCHING: OnceLock<bool> = OnceLock::new();

/// Does `work`, for which the terminal is changed, and calls `restore` after it, or before a signal
/// ends the process.
///
/// # Errors
///
/// If the system refuses to catch signals; then nothing has been done.
pub(crate) fn with_restored_terminal<T>(
    restore: impl Fn() + Send + 'static,
    work: impl FnOnce() -> T,
) -> io::Result<T> {
    *RESTORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(restore));
    if !*IS_WATCHING.get_or_init(|| watch().is_ok()) {
        return Err(io::Error::other("signals cannot be caught"));
    }
    let done = work();
    put_back();
    Ok(done)
}

/// Restores the terminal; returns whether it was in use.
fn put_back() -> bool {
    let restore = RESTORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    restore.map(|restore| restore()).is_some()
}

/// Starts to watch. Handlers stay, so this thread then takes the place of the signals' default.
fn watch() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let ends = REQUESTS.into_iter().chain([Number::HUP]).filter(|it| !was_ignored(*it));
    let before = ARE_CAUGHT.load(Ordering::SeqCst);
    let caught = tasks::block_on(&runtime, async { Caught::new(ends) });
    ARE_CAUGHT.store(before, Ordering::SeqCst);
    let mut caught = caught.map_err(|error| io::Error::other(error.to_string()))?;
    let watching = tasks::start_thread("prompt", move || {
        loop {
            let signal = EndSignal(tasks::block_on(&runtime, caught.next()));
            if put_back() || !ARE_CAUGHT.load(Ordering::SeqCst) {
                std::process::exit(signal.exit_status().into());
            }
        }
    });
    watching.map(drop)
}
