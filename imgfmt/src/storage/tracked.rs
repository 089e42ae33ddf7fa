//! A storage that knows whether everything written to it has been synced.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, fence};

use super::{
    BegunWrite, Capabilities, DirectAlignment, Durability, FileIdentity, Speed, Storage,
    StorageExtent, TryRead, ZeroMode,
};
use crate::units::HostOffset;

/// Forwards everything, and records changes and syncs. Changes of the same file that bypass it are
/// not recorded.
#[derive(Debug)]
pub(crate) struct Tracked {
    inner: Arc<dyn Storage>,
    may_be_unsynced: Arc<AtomicBool>,
}

/// A change that the caller carries out. Like every change, it is recorded again when it is over.
#[derive(Debug)]
struct BegunChange {
    inner: Option<Box<dyn BegunWrite>>,
    may_be_unsynced: Arc<AtomicBool>,
}

impl Tracked {
    /// Earlier writes count as not synced, unless `is_synced`.
    pub(crate) fn new(inner: Arc<dyn Storage>, is_synced: bool) -> Self {
        Self { inner, may_be_unsynced: Arc::new(AtomicBool::new(!is_synced)) }
    }

    /// Whether a change may not be on stable storage. No change may be in progress.
    pub(crate) fn may_be_unsynced(&self) -> bool {
        self.may_be_unsynced.load(SeqCst)
    }

    /// Carries out a change. It is recorded before, because it may fail in the middle, and after,
    /// because a sync in between need not cover it.
    fn change<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        note(&self.may_be_unsynced);
        let result = change();
        // Either a sync that began later covers the change, or its clearing of the flag is seen
        // here.
        fence(SeqCst);
        note(&self.may_be_unsynced);
        result
    }
}

/// Stores the flag only if necessary, because other threads read it.
fn note(may_be_unsynced: &AtomicBool) {
    if !may_be_unsynced.load(Relaxed) {
        may_be_unsynced.store(true, SeqCst);
    }
}

impl BegunWrite for BegunChange {
    fn written(mut self: Box<Self>) {
        if let Some(inner) = self.inner.take() {
            inner.written();
        }
    }
}

impl Drop for BegunChange {
    fn drop(&mut self) {
        // As for changes that this storage carries out.
        fence(SeqCst);
        note(&self.may_be_unsynced);
    }
}

impl Storage for Tracked {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        self.change(|| self.inner.write_at(offset, data, durability))
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(|| self.inner.set_len(length))
    }

    fn extend(&self, length: u64) -> io::Result<()> {
        self.change(|| self.inner.extend(length))
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.change(|| self.inner.punch_hole(offset, length))
    }

    fn sync(&self) -> io::Result<()> {
        self.may_be_unsynced.store(false, SeqCst);
        fence(SeqCst);
        self.inner.sync().inspect_err(|_| self.may_be_unsynced.store(true, SeqCst))
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn read_exact_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact_at(offset, buffer)
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        self.inner.try_read_at(offset, buffer)
    }

    fn write_zeroes(
        &self,
        offset: HostOffset,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
    ) -> io::Result<()> {
        self.change(|| self.inner.write_zeroes(offset, length, mode, speed))
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        self.inner.next_extent(offset, length)
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        self.inner.is_known_data(offset, length)
    }

    fn readahead(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.readahead(offset, length)
    }

    fn allocated_len(&self) -> io::Result<Option<u64>> {
        self.inner.allocated_len()
    }

    fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.inner.direct_alignment()
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.as_fd()
    }

    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.read_fd()
    }

    fn begin_write(&self, offset: HostOffset, length: u64) -> Option<Box<dyn BegunWrite>> {
        let inner = Some(self.inner.begin_write(offset, length)?);
        note(&self.may_be_unsynced);
        Some(Box::new(BegunChange { inner, may_be_unsynced: Arc::clone(&self.may_be_unsynced) }))
    }

    fn identity(&self) -> Option<FileIdentity> {
        self.inner.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use crate::testing::{FailingStorage, Fault};

    #[test]
    fn every_kind_of_change_counts_until_a_sync_has_succeeded() {
        let failing = FailingStorage::new(Arc::new(MemoryStorage::new(8192)));
        let synced = Tracked::new(Arc::clone(&failing) as _, true);
        assert!(!synced.may_be_unsynced());
        let tracked = Tracked::new(Arc::clone(&failing) as _, false);
        assert!(tracked.may_be_unsynced(), "nothing is known of what was written before");
        let start = HostOffset::new(0);
        let changes: [&dyn Fn() -> io::Result<()>; 5] = [
            &|| tracked.write_at(start, &[1; 10], Durability::Cached),
            &|| tracked.write_at(start, &[1; 10], Durability::Fua),
            &|| tracked.write_zeroes(start, 512, ZeroMode::KeepAllocated, Speed::Any),
            &|| tracked.punch_hole(start, 4096),
            &|| tracked.set_len(9000),
        ];
        for change in changes {
            tracked.sync().unwrap();
            assert!(!tracked.may_be_unsynced());
            tracked.read_at(start, &mut [0; 100]).unwrap();
            assert!(!tracked.may_be_unsynced(), "a read changes nothing");
            change().unwrap();
            assert!(tracked.may_be_unsynced());
            failing.set_fault(Some(Fault { calls: 0..u64::MAX, code: libc::EIO }));
            tracked.sync().unwrap_err();
            assert!(tracked.may_be_unsynced(), "a sync that failed");
            failing.set_fault(None);
            tracked.sync().unwrap();
            failing.set_fault(Some(Fault { calls: 0..u64::MAX, code: libc::EIO }));
            change().unwrap_err();
            failing.set_fault(None);
            assert!(tracked.may_be_unsynced(), "a change that failed may have been made in part");
        }
    }
}
