//! Locking what stays whole when a thread panics, and the rules of an image's locks.
//!
//! Locks are taken in this order, and none is held while data is moved except the stripes:
//!
//! 1. stripes: one per guest cluster (several clusters share one). Whoever changes the mapping of a
//!    cluster holds its stripe from the lookup to the commit. Writes in place need none.
//! 2. `l1_change`: making or moving an L2 table.
//! 3. the gate of commits: shared while a mapping is changed in memory, exclusive while a flush takes
//!    its copy of everything. So a copy holds each mapping with the refcounts it needs.
//! 4. the tables, the allocator, the lists; each for a moment.

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
