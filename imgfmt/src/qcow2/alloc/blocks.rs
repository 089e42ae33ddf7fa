//! Refcount blocks are read while the allocator is not locked: only threads that need a block wait
//! until it is read.

use std::sync::MutexGuard;

use crate::error::{ErrorKind, Result};
use crate::ordered_lock::Ordered;
use crate::qcow2::alloc::allocator::Allocator;
use crate::qcow2::alloc::clusters::Clusters;
use crate::qcow2::on_disk::cluster::HostCluster;

/// How many blocks are read for one piece of work while the allocator is not locked. Work on a
/// sound image needs one or two; the blocks of a hostile one may displace each other.
const LOADS_MAX: usize = 64;

/// The allocator, locked, with the refcount blocks that are in memory.
struct InMemory<'a>(Ordered<MutexGuard<'a, Allocator>>);

impl Drop for InMemory<'_> {
    fn drop(&mut self) {
        self.0.refcounts.read_missing();
    }
}

impl Clusters {
    /// Does some work on the allocator. If it fails for lack of a refcount block, the block is read
    /// and the work is done again; so work that fails must have changed nothing.
    pub(super) fn with_blocks<T>(
        &self,
        mut work: impl FnMut(&mut Allocator) -> Result<T>,
    ) -> Result<T> {
        self.with_blocks_under(|| (), |(), allocator| work(allocator))
    }

    /// As [`with_blocks`](Self::with_blocks), under other locks, which `lock` takes before the
    /// allocator is locked. They are not held while a block is read.
    pub(in crate::qcow2) fn with_blocks_under<G, T>(
        &self,
        lock: impl Fn() -> G,
        mut work: impl FnMut(&G, &mut Allocator) -> Result<T>,
    ) -> Result<T> {
        for _ in 0..LOADS_MAX {
            let held = lock();
            let mut allocator = InMemory(self.allocator()?);
            allocator.0.refcounts.read_nothing();
            let result = work(&held, &mut allocator.0);
            let missing = allocator.0.refcounts.read_missing();
            drop((allocator, held));
            match (result, missing) {
                (Err(_), Some(index)) => match self.load_block(index) {
                    Ok(()) => {}
                    // The work decides what that means, which may concern a single cluster of many.
                    Err(error) if error.kind() == ErrorKind::Corrupt => break,
                    Err(error) => return Err(error),
                },
                (result, _) => return result,
            }
        }
        let held = lock();
        let mut allocator = self.allocator()?;
        work(&held, &mut allocator)
    }

    /// Reads the refcount block of a cluster, unless it is in memory. If it cannot be read, the
    /// work that needs it fails.
    pub(super) fn load_block_of(&self, cluster: HostCluster) {
        let index = self.allocator().map(|allocator| allocator.refcounts.place(cluster).0);
        let _ = index.and_then(|index| self.load_block(index));
    }

    fn load_block(&self, index: usize) -> Result<()> {
        // The next thread that needs the same block finds it in memory.
        let _turn = self.block_load.lock();
        let Some(load) = self.allocator()?.refcounts.begin_load(index) else { return Ok(()) };
        let bytes = load.read()?;
        self.allocator()?.refcounts.end_load(&load, bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::error::ErrorKind;
    use crate::qcow2::alloc::clusters::tests::{Nothing, clusters_in_file};
    use crate::testing::{Call, Fault};
    use crate::units::HostOffset;

    #[test]
    fn a_refcount_block_that_is_being_read_keeps_nobody_from_the_allocator() {
        let (storage, clusters) = clusters_in_file(true);
        storage.hold(Call::Read, 2 << 16..3 << 16);
        std::thread::scope(|scope| {
            let reserving = scope.spawn(|| clusters.reserve(1, &Nothing));
            while storage.held() == 0 {
                std::thread::yield_now();
            }
            let is_free = clusters.allocator.as_ref().unwrap().try_lock().is_some();
            storage.release();
            assert_eq!(reserving.join().unwrap().unwrap().offset, HostOffset::new(4 << 16));
            assert!(is_free);
        });
        let calls = storage.calls();
        clusters.reserve(1, &Nothing).unwrap();
        assert_eq!(storage.calls(), calls, "the block is in memory");
    }

    #[test]
    fn a_refcount_block_that_cannot_be_read_is_an_error_of_each_reservation() {
        let (storage, clusters) = clusters_in_file(true);
        let calls = storage.calls()..u64::MAX;
        storage.set_fault(Some(Fault { calls, code: libc::EIO }));
        for _ in 0..3 {
            assert_eq!(clusters.reserve(1, &Nothing).unwrap_err().kind(), ErrorKind::Io);
        }
        storage.set_fault(None);
        assert_eq!(clusters.reserve(1, &Nothing).unwrap().offset, HostOffset::new(4 << 16));
    }
}
