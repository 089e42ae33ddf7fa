//! Counters with one writer.

use std::sync::atomic::{AtomicU64, Ordering};

/// Adds to a counter that one thread at a time changes: cheaper than a locked instruction.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}
