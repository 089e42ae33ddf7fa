//! Signals of commands that write: recorded, and checked between two steps.

use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};

use nbd_client::blocking::Interrupter;
use nbd_jobs::{Cancellation, TemporaryFile, tasks};
use rustix::process::Signal as Number;
use tokio::sync::watch::{Receiver, Sender, channel};

use super::{Caught, EndSignal, NOTICES, REQUESTS, was_ignored};
use crate::error::CommandError;

/// The first signal, once there is one; set while signals are watched.
static FIRST: OnceLock<Receiver<Option<EndSignal>>> = OnceLock::new();

/// Interrupts blocking calls to servers; used by the first signal.
static INTERRUPTER: LazyLock<Interrupter> = LazyLock::new(Interrupter::new);

/// Interrupts blocking calls to servers once a signal asks this command to end.
pub(crate) fn interrupter() -> &'static Interrupter {
    &INTERRUPTER
}
/// Cancels the jobs of this command.
static CANCELLATION: LazyLock<Cancellation> = LazyLock::new(Cancellation::new);

/// Starts to watch: from now on the first signal only requests the end of the command, and a second
/// one ends the process at once.
///
/// # Errors
///
/// If the system refuses to catch them.
pub(crate) fn watch() -> Result<(), CommandError> {
    let failed = |error| CommandError::new(format!("cannot watch for signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(failed)?;
    let ends = REQUESTS.into_iter().chain(NOTICES).chain([Number::HUP]);
    let caught =
        tasks::block_on(&runtime, async { Caught::new(ends.filter(|it| !was_ignored(*it))) })?;
    let (sender, receiver) = channel(None);
    if FIRST.set(receiver).is_err() {
        return Ok(());
    }
    let watching = tasks::start_thread("signals", move || {
        tasks::block_on(&runtime, remember(caught, &sender));
    });
    watching.map(drop).map_err(failed)
}

async fn remember(mut caught: Caught, first: &Sender<Option<EndSignal>>) {
    loop {
        let signal = EndSignal(caught.next().await);
        let is_first = first.send_if_modified(|first| first.replace(signal).is_none());
        if is_first {
            interrupter().interrupt(&reason(signal));
            CANCELLATION.cancel(reason(signal));
        }
        if is_first || !signal.is_request() {
            continue;
        }
        for path in DISPOSABLE.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // There is no receiver for the error.
            let _ = std::fs::remove_file(path);
        }
        std::process::exit(signal.exit_status().into());
    }
}

/// Files that are useless if the command is interrupted.
static DISPOSABLE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Registers a file that a second signal removes before it ends the process. It stays registered
/// until it was removed or is complete.
pub(crate) fn note_temporary_file(path: &Path, event: TemporaryFile) {
    let mut files = DISPOSABLE.lock().unwrap_or_else(PoisonError::into_inner);
    match event {
        TemporaryFile::Made => files.push(path.to_owned()),
        TemporaryFile::Gone => files.retain(|other| other != path),
    }
}

/// Returns the signal that has asked this command to end, if there is one.
pub(crate) fn caught() -> Option<EndSignal> {
    FIRST.get().and_then(|first| *first.borrow())
}

/// Returns the cancellation used by the signal that asks this command to end.
pub(crate) fn cancellation() -> Cancellation {
    CANCELLATION.clone()
}

/// Runs a step, which is not started after a signal.
///
/// # Errors
///
/// If a signal has asked this command to end.
pub(crate) fn stop_if_interrupted() -> Result<(), CommandError> {
    caught().map_or(Ok(()), |signal| Err(explained(signal)))
}

fn explained(signal: EndSignal) -> CommandError {
    CommandError::new(reason(signal))
}

fn reason(signal: EndSignal) -> String {
    format!("interrupted by {}", signal.name())
}
