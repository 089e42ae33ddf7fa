//! The flag that tells every part of the benchmark to end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Set when a signal has arrived.
static IS_ENDING: AtomicBool = AtomicBool::new(false);

/// Does not return after a signal: the other thread cleans up and ends the program. Callers call it
/// before an action or output that a signal makes pointless.
pub(crate) fn stop_if_ending() {
    while IS_ENDING.load(Ordering::Acquire) {
        thread::park();
    }
}

/// Makes every later call of [`stop_if_ending`] wait for the end of the program.
pub(crate) fn begin() {
    IS_ENDING.store(true, Ordering::Release);
}
