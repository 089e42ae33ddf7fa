//! The clusters of the file: reserving them, freeing them, and protecting them from early reuse.
//!
//! See [`allocator`](crate::qcow2::alloc::allocator) for the life of a cluster.

use std::collections::HashSet;
use std::sync::{Arc, MutexGuard};

use crate::error::{Error, ErrorKind, Result};
use crate::lease::{ClosedGeneration, Lease, Leases};
use crate::mapping::Lookup;
use crate::ordered_lock::{Ordered, OrderedMutex, rank};
use crate::qcow2::alloc::allocator::{Allocator, Batch, Freed, Quarantine, Reserved};
use crate::qcow2::alloc::decompressed::Decompressed;
use crate::qcow2::metadata::commits::Commits;
use crate::qcow2::metadata::metadata_file::{MetadataFile, unwritable};
use crate::qcow2::on_disk::cluster::{GuestCluster, HostCluster};
use crate::qcow2::on_disk::geometry::Geometry;

const STRIPES: u64 = 256;

/// Counts all references of an image.
pub(in crate::qcow2) trait CountReferences {
    /// The numbers of the refcount blocks that count something to which the image on disk refers.
    fn used_refcount_blocks(&self) -> Result<HashSet<u64>>;
}

/// The clusters of one image's file. A read-only image reserves and frees none.
#[derive(Debug)]
pub(in crate::qcow2) struct Clusters {
    pub(super) metadata: Arc<MetadataFile>,
    pub(super) commits: Arc<Commits>,
    /// One per guest cluster; several clusters share one.
    stripes: Vec<OrderedMutex<{ rank::STRIPE }, ()>>,
    pub(super) allocator: Option<OrderedMutex<{ rank::ALLOCATOR }, Allocator>>,
    /// Held while a refcount block is read.
    pub(super) block_load: OrderedMutex<{ rank::BLOCK_LOAD }, ()>,
    leases: Leases,
    /// References that were dropped since the last flush began.
    freed: OrderedMutex<{ rank::FREED }, Vec<Freed>>,
    quarantine: OrderedMutex<{ rank::QUARANTINE }, Quarantine>,
    pub(in crate::qcow2) decompressed: Decompressed,
}

impl Clusters {
    pub(in crate::qcow2) fn new(
        metadata: Arc<MetadataFile>,
        commits: Arc<Commits>,
        allocator: Option<Allocator>,
    ) -> Self {
        Self {
            metadata,
            commits,
            stripes: (0..STRIPES).map(|_| OrderedMutex::new(())).collect(),
            allocator: allocator.map(OrderedMutex::new),
            block_load: OrderedMutex::default(),
            leases: Leases::new(),
            freed: OrderedMutex::default(),
            quarantine: OrderedMutex::default(),
            decompressed: Decompressed::default(),
        }
    }

    /// Locks the stripes of `count` guest clusters from `first` on; `None` if another thread holds
    /// one of them and the lookup may not wait.
    pub(in crate::qcow2) fn lock(
        &self,
        first: GuestCluster,
        count: u64,
        lookup: Lookup,
    ) -> Option<Vec<Ordered<MutexGuard<'_, ()>>>> {
        let clusters = first.run(count.min(STRIPES));
        let mut indexes: Vec<u64> = clusters.map(|cluster| cluster.number() % STRIPES).collect();
        // Always in the same order, or two writers could wait for each other.
        indexes.sort_unstable();
        let stripes = indexes.into_iter().map(|index| &self.stripes[index as usize]);
        match lookup {
            Lookup::MayRead => Some(stripes.map(OrderedMutex::lock).collect()),
            Lookup::CachedOnly => stripes.map(OrderedMutex::try_lock).collect(),
        }
    }

    /// Protects clusters that are looked up from now on from reuse; `None` if the image was opened
    /// read-only, because then none is ever reused.
    #[inline]
    pub(in crate::qcow2) fn lease(&self) -> Option<Lease> {
        self.allocator.as_ref().map(|_| self.leases.take())
    }

    /// As [`lease`](Self::lease), for writers.
    pub(in crate::qcow2) fn lease_to_write(&self) -> Result<Lease> {
        self.lease().ok_or_else(unwritable)
    }

    /// The refcounts, and what is known about free clusters.
    pub(in crate::qcow2) fn allocator(&self) -> Result<Ordered<MutexGuard<'_, Allocator>>> {
        self.allocator.as_ref().map(OrderedMutex::lock).ok_or_else(unwritable)
    }

    /// Reserves up to `count_max` clusters next to each other.
    pub(in crate::qcow2) fn reserve(
        &self,
        count_max: u64,
        references: &(impl CountReferences + ?Sized),
    ) -> Result<Reserved> {
        self.release_quarantine();
        self.allocate(references, |allocator| allocator.reserve(count_max))
    }

    /// As [`reserve`](Self::reserve), but exactly `count` clusters.
    pub(in crate::qcow2) fn reserve_exact(
        &self,
        count: u64,
        references: &(impl CountReferences + ?Sized),
    ) -> Result<Reserved> {
        self.allocate(references, |allocator| allocator.reserve_exact(count))
    }

    /// Calls `reserve`, a second time if it fails for lack of a refcount block.
    ///
    /// Where a refcount block is missing within the file, its clusters may be in use all the same:
    /// all references are counted then, once.
    pub(in crate::qcow2) fn allocate<T>(
        &self,
        references: &(impl CountReferences + ?Sized),
        mut reserve: impl FnMut(&mut Allocator) -> Result<T>,
    ) -> Result<T> {
        let mut wants_used_blocks = false;
        let mut reserved = self.with_blocks(|allocator| {
            let reserved = reserve(allocator);
            wants_used_blocks = std::mem::take(&mut allocator.wants_used_blocks);
            reserved
        });
        if reserved.is_err() && wants_used_blocks {
            let used = references.used_refcount_blocks()?;
            self.allocator()?.note_used_blocks(used);
            reserved = self.with_blocks(&mut reserve);
        }
        let reserved = reserved.map_err(|error| self.metadata.note_damage(error))?;
        self.commits.changes.note();
        Ok(reserved)
    }

    /// As [`reserve`](Self::reserve); `None` if that would wait and the lookup may not.
    pub(in crate::qcow2) fn reserve_if(
        &self,
        count_max: u64,
        lookup: Lookup,
        references: &(impl CountReferences + ?Sized),
    ) -> Result<Option<Reserved>> {
        if lookup == Lookup::MayRead {
            return self.reserve(count_max, references).map(Some);
        }
        let Some(mut allocator) = self.allocator.as_ref().ok_or_else(unwritable)?.try_lock() else {
            return Ok(None);
        };
        let reserved = allocator.reserve_in_memory(count_max);
        let reserved = reserved.map_err(|error| self.metadata.note_damage(error))?;
        if reserved.is_some() {
            self.commits.changes.note();
        }
        Ok(reserved)
    }

    /// Gives back the space that a failed write has taken for reserved clusters: on a full disk,
    /// what is next written to other clusters needs it.
    pub(in crate::qcow2) fn punch(&self, reserved: &[Reserved]) {
        let cluster_bits = self.metadata.header().geometry.cluster_bits;
        for place in reserved {
            let _ = self.metadata.file.punch_hole(place.offset, place.clusters << cluster_bits);
        }
    }

    /// Releases reserved clusters that were never used.
    pub(in crate::qcow2) fn release(&self, reserved: &[Reserved]) {
        if reserved.is_empty() {
            return;
        }
        // A read-only image has reserved nothing.
        if let Ok(mut allocator) = self.allocator() {
            reserved.iter().for_each(|reserved| allocator.release(*reserved));
            self.commits.changes.note();
        }
    }

    /// Drops references. The clusters become free once a flush has made that durable and every
    /// lease taken before has ended.
    pub(in crate::qcow2) fn free(&self, freed: impl IntoIterator<Item = Freed>) {
        self.freed.lock().extend(freed);
        self.commits.changes.note();
    }

    /// How many references were dropped since the last flush began.
    pub(in crate::qcow2) fn freed_count(&self) -> usize {
        self.freed.lock().len()
    }

    /// What was freed so far, for a flush that puts that on disk, and the generation of leases that
    /// may know of it. No mapping changes meanwhile.
    pub(in crate::qcow2) fn take_freed(&self) -> (Vec<Freed>, ClosedGeneration) {
        let freed = std::mem::take(&mut *self.freed.lock());
        (freed, self.leases.close_generation())
    }

    /// Takes back what a flush that failed has [taken](Self::take_freed).
    pub(in crate::qcow2) fn return_freed(&self, mut freed: Vec<Freed>) {
        self.freed.lock().append(&mut freed);
    }

    /// Keeps what was freed until leases have ended.
    pub(in crate::qcow2) fn quarantine(&self, generation: ClosedGeneration, freed: Vec<Freed>) {
        // Also with nothing freed: what is freed later must wait for the leases of all generations
        // that came before.
        if !freed.is_empty() || !generation.has_ended() {
            self.quarantine.lock().push_back(Batch { generation, freed });
        }
    }

    /// Refuses a change while a lease is held or freed clusters wait for one. Everything is
    /// flushed.
    pub(in crate::qcow2) fn refuse_leases(&self) -> Result<()> {
        let generation = self.leases.close_generation();
        self.release_quarantine();
        let mut quarantine = self.quarantine.lock();
        if !generation.has_ended() || !quarantine.is_empty() {
            // The image goes on being used: what is freed later still waits for these leases.
            quarantine.push_back(Batch { generation, freed: Vec::new() });
            let detail = "something is still being read from the image; try again when it is done";
            return Err(Error::new(ErrorKind::Busy, "change", detail));
        }
        Ok(())
    }

    /// Releases freed clusters whose leases have ended.
    pub(in crate::qcow2) fn release_quarantine(&self) {
        let Some(mut quarantine) = self.quarantine.try_lock() else { return };
        while quarantine.front().is_some_and(|batch| batch.generation.has_ended()) {
            if let Some(batch) = quarantine.pop_front() {
                self.release_freed(batch.freed);
            }
        }
    }

    /// Releases all freed clusters, when no more clusters can be reserved.
    pub(in crate::qcow2) fn release_all_freed(&self) {
        let batches = std::mem::take(&mut *self.quarantine.lock());
        for mut batch in batches {
            if !batch.generation.has_ended() {
                // A lease on these bytes may still be held: they stay where they are.
                batch.freed.iter_mut().for_each(|freed| freed.punch = false);
            }
            self.release_freed(batch.freed);
        }
    }

    fn release_freed(&self, mut freed: Vec<Freed>) {
        self.decompressed.forget_all();
        freed.sort_unstable();
        let geometry = self.metadata.header().geometry;
        let block_of = |freed: &Freed| freed.cluster.number() / geometry.block_entries();
        for of_block in freed.chunk_by(|a, b| block_of(a) == block_of(b)) {
            self.release_in_block(geometry, of_block);
        }
        self.commits.changes.note();
    }

    /// Releases freed clusters that one refcount block counts.
    fn release_in_block(&self, geometry: Geometry, freed: &[Freed]) {
        if let Some(first) = freed.first() {
            self.load_block_of(first.cluster);
        }
        let Ok(mut allocator) = self.allocator() else { return };
        let only = |freed: &&Freed| {
            freed.punch && matches!(allocator.refcounts.refcount(freed.cluster), Ok(1))
        };
        let punched: Vec<HostCluster> =
            freed.iter().filter(only).map(|freed| freed.cluster).collect();
        drop(allocator);
        // The hole must be there before anyone can reserve the cluster and write to it.
        self.metadata.note_alive();
        for run in punched.chunk_by(|a, b| *a + 1 == *b) {
            let length = (run.len() as u64) << geometry.cluster_bits;
            // Giving space back is a courtesy to the file system; without it nothing is wrong.
            let _ = self.metadata.file.punch_hole(geometry.host_offset(run[0]), length);
        }
        let Ok(mut allocator) = self.allocator() else { return };
        // A refcount that cannot be changed leaves a leaked cluster, which is harmless. But a
        // cluster that was free already had two owners, and may have a third by now.
        let errors = freed.iter().filter_map(|freed| allocator.dereference(freed.cluster).err());
        let damage = errors.filter(|error| error.kind() == ErrorKind::Corrupt).last();
        drop(allocator);
        if let Some(damage) = damage {
            drop(self.metadata.note_damage(damage));
        }
    }
}

#[cfg(test)]
pub(in crate::qcow2) mod tests {
    use super::*;
    use crate::qcow2::alloc::allocator::make_allocator;
    use crate::qcow2::metadata::metadata_file::tests::opened;
    use crate::testing::FailingStorage;
    use crate::units::HostOffset;

    /// The first cluster that is free in a new image.
    const FOUR: HostCluster = HostCluster::new(4);

    /// Of an image in which nothing is referred to.
    pub(in crate::qcow2) struct Nothing;

    impl CountReferences for Nothing {
        fn used_refcount_blocks(&self) -> Result<HashSet<u64>> {
            Ok(HashSet::new())
        }
    }

    fn clusters(is_writable: bool) -> Clusters {
        clusters_in_file(is_writable).1
    }

    pub(in crate::qcow2) fn clusters_in_file(is_writable: bool) -> (Arc<FailingStorage>, Clusters) {
        let (storage, metadata) = opened(is_writable);
        let allocator = make_allocator(&metadata.file, &metadata.header()).unwrap();
        let allocator = is_writable.then_some(allocator);
        (storage, Clusters::new(Arc::new(metadata), Arc::default(), allocator))
    }

    #[test]
    fn a_freed_cluster_is_reserved_again_after_a_flush_and_the_last_lease() {
        let clusters = clusters(true);
        let first = clusters.reserve(1, &Nothing).unwrap();
        assert_eq!((first.offset, first.clusters), (HostOffset::new(4 << 16), 1));
        let lease = clusters.lease().unwrap();
        clusters.free([Freed { cluster: FOUR, punch: true }]);
        assert_eq!(clusters.freed_count(), 1);
        assert_eq!(clusters.reserve(1, &Nothing).unwrap().offset, HostOffset::new(5 << 16));
        let (freed, generation) = clusters.take_freed();
        clusters.quarantine(generation, freed);
        assert_eq!(clusters.reserve(1, &Nothing).unwrap().offset, HostOffset::new(6 << 16));
        assert_eq!(clusters.refuse_leases().unwrap_err().kind(), ErrorKind::Busy);
        drop(lease);
        assert_eq!(clusters.reserve(1, &Nothing).unwrap().offset, HostOffset::new(4 << 16));
        clusters.refuse_leases().unwrap();
    }

    #[test]
    fn what_a_failed_flush_gives_back_is_freed_by_the_next_one() {
        let clusters = clusters(true);
        clusters.reserve(1, &Nothing).unwrap();
        clusters.free([Freed { cluster: FOUR, punch: false }]);
        let (freed, generation) = clusters.take_freed();
        clusters.return_freed(freed);
        clusters.quarantine(generation, Vec::new());
        clusters.release_quarantine();
        assert_eq!(clusters.allocator().unwrap().refcounts.refcount(FOUR).unwrap(), 1);
        let (freed, generation) = clusters.take_freed();
        clusters.quarantine(generation, freed);
        clusters.release_quarantine();
        assert_eq!(clusters.allocator().unwrap().refcounts.refcount(FOUR).unwrap(), 0);
    }

    #[test]
    fn a_cluster_freed_twice_marks_the_image_as_damaged() {
        let clusters = clusters(true);
        clusters.reserve(1, &Nothing).unwrap();
        clusters.free([Freed { cluster: FOUR, punch: false }; 2]);
        let (freed, generation) = clusters.take_freed();
        clusters.quarantine(generation, freed);
        clusters.release_quarantine();
        assert!(clusters.metadata.refuse_if_corrupt().is_err());
    }

    #[test]
    fn what_only_reads_needs_no_leases_and_reserves_nothing() {
        let clusters = clusters(false);
        assert!(clusters.lease().is_none());
        let refused = [
            clusters.lease_to_write().unwrap_err(),
            clusters.reserve(1, &Nothing).unwrap_err(),
            clusters.reserve_exact(2, &Nothing).unwrap_err(),
        ];
        assert!(refused.iter().all(|error| error.kind() == ErrorKind::ReadOnly));
    }

    #[test]
    fn a_stripe_that_somebody_has_is_not_waited_for() {
        let clusters = clusters(true);
        let held = clusters.lock(GuestCluster::new(3), 2, Lookup::MayRead);
        assert!(clusters.lock(GuestCluster::new(4), 1, Lookup::CachedOnly).is_none());
        assert!(clusters.lock(GuestCluster::new(5), STRIPES - 2, Lookup::CachedOnly).is_some());
        drop(held);
        assert!(clusters.lock(GuestCluster::new(0), 2 * STRIPES, Lookup::CachedOnly).is_some());
    }
}
