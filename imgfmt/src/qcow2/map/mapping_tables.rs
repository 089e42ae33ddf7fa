//! The mapping tables of one image: the L1 table, the L2 tables in memory, and the parts of both
//! that are not on disk.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, OnceLock, RwLockReadGuard};

use crate::error::Result;
use crate::ordered_lock::{Ordered, OrderedMutex, OrderedRwLock, rank};
use crate::qcow2::alloc::clusters::Clusters;
use crate::qcow2::map::cache::TableCache;
use crate::qcow2::map::slices::Slices;
use crate::qcow2::map::table::{DirtyPart, Table};
use crate::qcow2::metadata::commits::Commits;
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::l2::{EntryFormat, table_of};
use crate::qcow2::on_disk::snapshot::{self, Snapshot};
use crate::units::{HostOffset, Offset as _};

/// The mapping from guest offsets to clusters of the file.
#[derive(Debug)]
pub(in crate::qcow2) struct MappingTables {
    pub(super) metadata: Arc<MetadataFile>,
    pub(super) clusters: Arc<Clusters>,
    pub(super) commits: Arc<Commits>,
    pub(in crate::qcow2) format: EntryFormat,
    /// Offsets of L2 tables and their COPIED bits, as in the file.
    pub(super) l1: Box<[AtomicU64]>,
    /// L1 entries that are not yet on disk.
    pub(super) dirty_l1: OrderedMutex<{ rank::DIRTY_L1 }, BTreeSet<usize>>,
    /// Held while an L2 table is made or moved.
    pub(super) l1_change: OrderedMutex<{ rank::L1_CHANGE }, ()>,
    /// The slices of the tables in `tables`.
    pub(in crate::qcow2) slices: Slices,
    pub(super) tables: TableCache,
    /// The user's memory limit for them, in bytes.
    cache_bytes: Option<u64>,
    /// The places of the L2 tables and what is known about them, if the image is open for writing.
    pub(super) l2_places: OrderedRwLock<{ rank::L2_PLACES }, L2Places>,
    /// The places of the snapshot table, the snapshots' L1 tables, and the LUKS header.
    pub(super) other_places: Vec<Range<HostOffset>>,
    luks_place: Option<Range<HostOffset>>,
    /// Offset and number of entries of the snapshots' L1 tables.
    pub(super) snapshot_l1s: Vec<(HostOffset, u32)>,
    /// Offsets of the L2 tables that they name; read when the first table is searched for bad
    /// entries.
    pub(super) snapshot_l2s: OnceLock<HashSet<HostOffset>>,
}

/// The L2 tables of the present state, by their offsets.
#[derive(Debug, Default)]
pub(super) struct L2Places {
    /// The tables that the L1 table names.
    pub(super) named: HashSet<HostOffset>,
    /// The units of tables ([`Slices::unit`]) that have changed since the image was opened. A unit
    /// remains when its table is freed: its place has changed since the opening.
    pub(super) changed: HashSet<HostOffset>,
    /// Offsets of the bad entries that were found: they stay bad when their table changes.
    pub(super) bad: BTreeSet<HostOffset>,
}

impl L2Places {
    /// Records the bad entries of a new table of `length` bytes, by their offsets in bytes from its
    /// start. They replace those of the former content of its place.
    pub(super) fn replace_bad(&mut self, table: HostOffset, length: u64, bad: Vec<u64>) {
        let former: Vec<HostOffset> = self.bad.range(table..table + length).copied().collect();
        for place in former {
            self.bad.remove(&place);
        }
        self.bad.extend(bad.into_iter().map(|place| table + place));
    }
}

/// Parts of the tables that are not on disk.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct DirtyTables {
    /// In order of their offsets.
    pub(in crate::qcow2) tables: Vec<(Arc<Table>, DirtyPart)>,
    /// Indexes and values of L1 entries.
    pub(in crate::qcow2) l1: Vec<(usize, u64)>,
}

impl DirtyTables {
    /// Calls `write` with the changed parts of tables and their offsets in the file. Consecutive
    /// slices are written at once.
    pub(in crate::qcow2) fn for_each_run(
        &self,
        mut write: impl FnMut(HostOffset, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let start_of =
            |(table, part): &(Arc<Table>, DirtyPart)| table.offset + part.first_word as u64 * 8;
        let is_continued = |part: &(Arc<Table>, DirtyPart), next: &(Arc<Table>, DirtyPart)| {
            start_of(part) + part.1.bytes.len() as u64 == start_of(next)
        };
        for run in self.tables.chunk_by(is_continued) {
            match run {
                [only] => write(start_of(only), &only.1.bytes)?,
                run => {
                    let bytes: Vec<u8> =
                        run.iter().flat_map(|(_, part)| &part.bytes).copied().collect();
                    write(start_of(&run[0]), &bytes)?;
                }
            }
        }
        Ok(())
    }
}

impl MappingTables {
    /// The tables of a disk of `size` bytes. `cache_bytes` is the memory limit for L2 tables.
    pub(in crate::qcow2) fn new(
        (metadata, clusters, commits): (Arc<MetadataFile>, Arc<Clusters>, Arc<Commits>),
        format: EntryFormat,
        l1: Vec<u64>,
        size: u64,
        cache_bytes: Option<u64>,
    ) -> Self {
        let slices = Slices::new(format.geometry, size, cache_bytes);
        let mut mapping = Self {
            metadata,
            clusters,
            commits,
            format,
            l1: Box::default(),
            dirty_l1: OrderedMutex::default(),
            l1_change: OrderedMutex::default(),
            slices,
            tables: TableCache::new(slices.count_max),
            cache_bytes,
            l2_places: OrderedRwLock::default(),
            other_places: Vec::new(),
            luks_place: None,
            snapshot_l1s: Vec::new(),
            snapshot_l2s: OnceLock::new(),
        };
        mapping.replace_l1(l1);
        mapping.note_l2_places();
        mapping
    }

    #[inline]
    pub(in crate::qcow2) fn geometry(&self) -> Geometry {
        self.format.geometry
    }

    /// The number of entries of the L1 table.
    pub(in crate::qcow2) fn l1_len(&self) -> usize {
        self.l1.len()
    }

    /// The L1 table in memory.
    pub(in crate::qcow2) fn l1_words(&self) -> Vec<u64> {
        self.l1.iter().map(|entry| entry.load(Acquire)).collect()
    }

    /// Replaces the L1 table by one that is in the file already.
    pub(in crate::qcow2) fn replace_l1(&mut self, l1: Vec<u64>) {
        self.l1 = l1.into_iter().map(AtomicU64::new).collect();
    }

    /// Changes an entry of the L1 table; the next flush writes it.
    pub(in crate::qcow2) fn set_l1(&self, index: usize, entry: u64) {
        self.l1[index].store(entry, Release);
        self.dirty_l1.lock().insert(index);
        self.commits.changes.note();
    }

    /// Forgets all L2 tables in memory, none of which is dirty, and prepares for those of a disk of
    /// `size` bytes.
    pub(in crate::qcow2) fn forget_tables(&mut self, size: u64) {
        self.slices = Slices::new(self.geometry(), size, self.cache_bytes);
        self.tables = TableCache::new(self.slices.count_max);
        self.clusters.decompressed.forget_all();
        self.note_l2_places();
    }

    /// Whether so many tables are dirty that they should be written before others change.
    pub(in crate::qcow2) fn is_under_pressure(&self) -> bool {
        self.tables.is_under_pressure()
    }

    /// Takes a copy of all parts that are not on disk, and marks them as clean. No mapping changes
    /// meanwhile.
    pub(in crate::qcow2) fn take_dirty(&self) -> DirtyTables {
        let mut tables = self.tables.take_dirty();
        tables.sort_unstable_by_key(|(table, _)| table.offset);
        let l1 = std::mem::take(&mut *self.dirty_l1.lock());
        let l1 = l1.into_iter().map(|index| (index, self.l1[index].load(Acquire))).collect();
        DirtyTables { tables, l1 }
    }

    /// Marks parts that could not be written as dirty again.
    pub(in crate::qcow2) fn return_dirty(&self, dirty: &DirtyTables) {
        self.tables.return_dirty(&dirty.tables);
        self.dirty_l1.lock().extend(dirty.l1.iter().map(|(index, _)| *index));
    }

    /// Records the places of the snapshot table, at `table_offset`, and of the snapshots' L1
    /// tables.
    pub(in crate::qcow2) fn note_snapshots(
        &mut self,
        table_offset: HostOffset,
        snapshots: &[Snapshot],
    ) {
        let place = |offset: HostOffset, length| offset..offset.saturating_add(length);
        let table = place(table_offset, snapshot::table_length(snapshots));
        let l1s = snapshots
            .iter()
            .map(|snapshot| place(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8));
        let places = l1s.chain([table]).filter(|place| !place.is_empty());
        self.other_places = places.chain(self.luks_place.clone()).collect();
        self.snapshot_l1s = snapshots.iter().map(|it| (it.l1_offset, it.l1_entries)).collect();
        self.snapshot_l2s = OnceLock::new();
    }

    /// Records the place of the LUKS header, before the snapshots are recorded.
    pub(in crate::qcow2) fn note_luks_header(&mut self, place: Option<(HostOffset, u64)>) {
        self.luks_place = place.map(|(offset, length)| offset..offset.saturating_add(length));
    }

    /// Records the places of the L2 tables of the active L1 table, replacing earlier ones.
    fn note_l2_places(&mut self) {
        if self.metadata.is_writable() {
            let tables = self.l1.iter().filter_map(|entry| table_of(entry.load(Acquire)));
            self.l2_places.get_mut().named = tables.collect();
        }
    }

    pub(super) fn l2_places(&self) -> Ordered<RwLockReadGuard<'_, L2Places>> {
        self.l2_places.read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::qcow2::alloc::allocator::make_allocator;
    use crate::qcow2::alloc::clusters::tests::Nothing;
    use crate::qcow2::metadata::metadata_file::tests::opened;
    use crate::qcow2::on_disk::l2::COPIED;
    use crate::units::GuestOffset;

    fn mapping(is_writable: bool) -> MappingTables {
        let (_, metadata) = opened(is_writable);
        let header = metadata.header();
        let allocator = make_allocator(&metadata.file, &header).unwrap();
        let (metadata, commits) = (Arc::new(metadata), Arc::new(Commits::default()));
        let allocator = is_writable.then_some(allocator);
        let clusters = Clusters::new(Arc::clone(&metadata), Arc::clone(&commits), allocator);
        let geometry = header.geometry;
        let format = EntryFormat { geometry, version: 3, has_data_file: false };
        let parts = (metadata, Arc::new(clusters), commits);
        MappingTables::new(parts, format, vec![0], header.size, None)
    }

    #[test]
    fn a_new_table_is_dirty_until_a_flush_has_written_it() {
        let mapping = mapping(true);
        let table = mapping.table_for_write(GuestOffset::new(0), &Nothing).unwrap();
        let entry = table.offset.bytes() | COPIED;
        assert_eq!(mapping.l1_words(), [entry]);
        assert!(Arc::ptr_eq(
            &table,
            &mapping.table_for_write(GuestOffset::new(0), &Nothing).unwrap()
        ));
        let dirty = mapping.take_dirty();
        assert_eq!((dirty.tables.len(), &dirty.l1[..]), (1, &[(0, entry)][..]));
        assert!(mapping.take_dirty().tables.is_empty());
        mapping.return_dirty(&dirty);
        let again = mapping.take_dirty();
        assert_eq!((again.tables.len(), again.l1), (1, dirty.l1));
    }

    #[test]
    fn a_shared_table_is_moved_before_it_is_changed_and_the_old_one_freed() {
        let mapping = mapping(true);
        let shared = mapping.table_for_write(GuestOffset::new(0), &Nothing).unwrap();
        mapping.set_l1(0, shared.offset.bytes());
        assert!(mapping.own_table_in_memory(GuestOffset::new(0)).unwrap().is_none());
        let own = mapping.table_for_write(GuestOffset::new(0), &Nothing).unwrap();
        assert_ne!(own.offset, shared.offset);
        assert_eq!(mapping.clusters.freed_count(), 1);
        assert_eq!(mapping.l2_places().named, HashSet::from([own.offset]));
    }

    #[test]
    fn a_table_counts_as_changed_from_its_first_commit_on() {
        let mapping = mapping(true);
        let table = mapping.table_for_write(GuestOffset::new(0), &Nothing).unwrap();
        assert!(mapping.l2_places().changed.is_empty());
        for _ in 0..2 {
            mapping.commit(&table, &[], &[]).unwrap();
            let units: HashSet<HostOffset> = mapping.slices.units(table.offset).collect();
            assert_eq!(mapping.l2_places().changed, units);
        }
        mapping.commit(&Table::new(HostOffset::new(9 << 16), vec![0; 8192]), &[], &[]).unwrap();
        assert!(mapping.l2_places().changed.contains(&HostOffset::new(9 << 16)));
    }

    #[test]
    fn a_new_table_has_the_bad_entries_it_was_made_with_and_no_former_ones() {
        let mut places = L2Places::default();
        let [table, next] = [0x1000, 0x2000].map(HostOffset::new);
        places.replace_bad(table, 0x1000, vec![0, 8]);
        places.replace_bad(next, 0x1000, vec![16]);
        places.replace_bad(table, 0x1000, vec![24]);
        assert_eq!(places.bad, BTreeSet::from([table + 24, next + 16]));
    }

    #[test]
    fn an_entry_that_points_to_metadata_is_not_followed_by_a_change() {
        let mapping = mapping(true);
        // The L2 table itself, the refcount block, a cluster that was never reserved.
        let own = mapping.table_for_write(GuestOffset::new(0), &Nothing).unwrap().offset;
        for host in [own.bytes(), 2 << 16, 9 << 16] {
            let mut words = vec![0; (1 << 16) / 8];
            words[1] = host | COPIED;
            let table = Table::new(own, words);
            mapping.refuse_bad(&table, GuestOffset::new(0)).unwrap();
            let refused = mapping.refuse_bad(&table, GuestOffset::new(1 << 16)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Corrupt, "{host:#x}");
        }
        assert!(mapping.metadata.refuse_if_corrupt().is_err());
    }

    #[test]
    fn a_table_is_not_made_in_an_image_that_is_only_read() {
        let mapping = mapping(false);
        let refused = mapping.table_for_write(GuestOffset::new(0), &Nothing).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
        assert_eq!(mapping.l1_words(), [0]);
    }
}
