//! The flag that tells every part of the benchmark to end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Set when a signal has come.
static IS_ENDING: AtomicBool = AtomicBool::new(false);

/// Does not return when a signal has come: the other thread cleans up and ends the program. Called
/// before anything is started or said that this would make pointless.
pub(crate) fn stop_if_ending() {
    while IS_ENDING.load(Ordering::Acquire) {
        thread::park();
    }
}

/// Makes every later call of [`stop_if_ending`] wait for the end of the program.
pub(crate) fn begin() {
    IS_ENDING.store(true, Ordering::Release);
}
