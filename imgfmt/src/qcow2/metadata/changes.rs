//! Counts changes of metadata in memory, and those of them that are on disk.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire};

/// The number of changes of metadata, and the number of the first ones that are on disk.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct Changes {
    made: AtomicU64,
    durable: AtomicU64,
}

impl Changes {
    /// Counts a change. A flush must find made what it finds counted: call this after the change
    /// has been made in memory, or while the gate of commits or the allocator is locked.
    pub(in crate::qcow2) fn note(&self) {
        self.made.fetch_add(1, AcqRel);
    }

    /// The number of changes since the image was opened.
    pub(in crate::qcow2) fn made(&self) -> u64 {
        self.made.load(Acquire)
    }

    /// Records that the first `count` changes are on disk.
    pub(in crate::qcow2) fn are_durable(&self, count: u64) {
        self.durable.fetch_max(count, AcqRel);
    }

    /// Whether a change may not be on disk.
    pub(in crate::qcow2) fn are_pending(&self) -> bool {
        self.made.load(Acquire) != self.durable.load(Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_made_while_an_older_one_is_written_stays_pending() {
        let changes = Changes::default();
        assert!(!changes.are_pending());
        changes.note();
        let written = changes.made();
        changes.note();
        changes.are_durable(written);
        assert!(changes.are_pending());
        changes.are_durable(changes.made());
        changes.are_durable(written);
        assert!(!changes.are_pending());
    }
}
