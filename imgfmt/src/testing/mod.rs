//! Storages for tests: some record the states that a crash could leave, one injects errors and
//! delays.
//!
//! Built only with the feature `test-util`.

mod directory;
mod failing;
mod recorder;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::storage::BegunWrite;

pub use directory::RecordedDirectory;
pub use failing::{Call, FailingStorage, Fault};
pub(crate) use recorder::MappedWords;
pub use recorder::{Loss, Recorder, RecordingStorage};

/// The unit that a disk writes completely or not at all, in bytes.
pub const SECTOR: u64 = 512;

/// A write that a test carries out.
#[derive(Debug)]
struct Begun;

impl BegunWrite for Begun {
    fn written(self: Box<Self>) {}
}

// A thread that panicked while it held a lock has already failed the test.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
