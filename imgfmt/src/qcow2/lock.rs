//! Locking what stays whole when a thread panics.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Locks a mutex whose content is whole even if a thread panicked while it held it.
pub(in crate::qcow2) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As [`lock`], if nobody has it.
pub(in crate::qcow2) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
