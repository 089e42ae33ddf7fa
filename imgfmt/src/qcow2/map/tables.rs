//! L2 tables for changes: created if missing, copied if a snapshot shares them.

use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use crate::error::Result;
use crate::qcow2::alloc::allocator::Freed;
use crate::qcow2::alloc::clusters::CountReferences;
use crate::qcow2::map::lookup::Lookup;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::map::table::Table;
use crate::qcow2::on_disk::l2::{COPIED, Cluster, Compressed};
use crate::qcow2::on_disk::words::words_to_bytes;
use crate::storage::Durability;
use crate::units::{GuestOffset, HostOffset};

/// A change of one L2 entry.
#[derive(Clone, Copy, Debug)]
pub(in crate::qcow2) struct Change {
    /// Any guest offset within the cluster.
    pub(in crate::qcow2) guest: GuestOffset,
    pub(in crate::qcow2) cluster: Cluster,
}

impl MappingTables {
    /// Whether an L1 entry's table belongs to it alone.
    pub(in crate::qcow2) fn l1_is_copied(&self, l1_index: u64) -> bool {
        self.l1.get(l1_index as usize).is_some_and(|entry| entry.load(Acquire) & COPIED != 0)
    }

    /// The slice of a table that maps a guest offset; the table is created or copied if necessary,
    /// so that it may be changed.
    pub(in crate::qcow2) fn table_for_write(
        &self,
        guest: GuestOffset,
        references: &impl CountReferences,
    ) -> Result<Arc<Table>> {
        self.metadata.refuse_unwritable()?;
        if let Some(table) = self.own_table(guest)? {
            return Ok(table);
        }
        let _changing = self.l1_change.lock();
        if let Some(table) = self.own_table(guest)? {
            return Ok(table);
        }
        let (geometry, l1_index) = (self.geometry(), self.geometry().l1_index(guest));
        let shared_offset = self.table_offset(l1_index)?;
        let shared = self.whole_table(l1_index)?;
        let mut words: Vec<u64> = shared.iter().flat_map(|(slice, _)| slice.words()).collect();
        words.resize((geometry.cluster_size() / 8) as usize, 0);
        // Before it is copied: bad entries in it are bad in the copy.
        let bad = self.bad_places(&shared)?;
        let reserved = self.clusters.reserve(1, references)?;
        // Written completely now, so that a full disk is noticed now and not by a flush.
        let bytes = words_to_bytes(&words);
        let offset = reserved.offset;
        if let Err(error) = self.metadata.file.write_at(offset, &bytes, Durability::Cached) {
            self.clusters.release(&[reserved]);
            let guest = geometry.table_start(l1_index);
            return Err(self.metadata.io("write an L2 table of", error, guest));
        }
        let _gate = self.commits.enter_gate();
        let mut places = self.l2_places.write();
        places.named.insert(offset);
        places.replace_bad(offset, geometry.cluster_size(), bad);
        if let Some(shared) = &shared_offset {
            places.named.remove(shared);
        }
        drop(places);
        let table = self.insert_new(offset, &words, guest);
        self.set_l1(l1_index as usize, offset.bytes() | COPIED);
        let replaced = shared_offset.map(|shared| geometry.host_cluster(shared));
        self.clusters.free(replaced.map(|cluster| Freed { cluster, punch: false }));
        Ok(table)
    }

    /// Puts a new table into memory, slice by slice. Returns the slice that maps a guest offset.
    fn insert_new(&self, table: HostOffset, words: &[u64], guest: GuestOffset) -> Arc<Table> {
        let slice_of = |number: usize, words: &[u64]| {
            let offset = table + (number * self.slices.words() * 8) as u64;
            let slice = Table::new(offset, words.to_vec());
            // It may not be on disk before a flush has written it again and synced.
            slice.change().mark_dirty(0, slice.len());
            self.tables.note_dirty();
            let slice = Arc::new(slice);
            self.tables.insert(Arc::clone(&slice));
            slice
        };
        let chunks = words.chunks(self.slices.words()).enumerate();
        let slices: Vec<Arc<Table>> =
            chunks.map(|(number, words)| slice_of(number, words)).collect();
        let wanted = (self.slices.offset(table, guest) - table) / (self.slices.words() as u64 * 8);
        Arc::clone(&slices[wanted as usize])
    }

    /// The slice of a table that maps a guest offset, if it is in memory, may be changed, and was
    /// searched for bad entries.
    pub(in crate::qcow2) fn own_table_in_memory(
        &self,
        guest: GuestOffset,
    ) -> Result<Option<Arc<Table>>> {
        if !self.l1_is_copied(self.geometry().l1_index(guest)) {
            return Ok(None);
        }
        let table = self.table(guest, Lookup::CachedOnly)?.flatten();
        Ok(table.filter(|table| table.bad_entries.get().is_some()))
    }

    fn own_table(&self, guest: GuestOffset) -> Result<Option<Arc<Table>>> {
        if !self.l1_is_copied(self.geometry().l1_index(guest)) {
            return Ok(None);
        }
        Ok(self.table(guest, Lookup::MayRead)?.flatten())
    }

    /// Makes changes of mappings visible, and frees the clusters that they replaced. The caller
    /// holds the stripes of all clusters concerned, and the data they point to has been written.
    pub(in crate::qcow2) fn commit(
        &self,
        table: &Table,
        changes: &[Change],
        freed: &[Freed],
    ) -> Result<()> {
        self.metadata.refuse_unwritable()?;
        let words_per_entry = self.geometry().entry_words();
        let _gate = self.commits.enter_gate();
        // Before other threads can see the changes: a mapping that is found without one is on disk.
        self.commits.changes.note();
        // Before any entry names a reserved cluster.
        table.list_as_changed(|| {
            self.l2_places.write().changed.extend(self.slices.units(table.offset));
        });
        let mut entries = table.change();
        for change in changes {
            let index = self.slices.index(change.guest) * words_per_entry;
            if entries.set(index, words_per_entry, self.format.encode(change.cluster)) {
                self.tables.note_dirty();
            }
        }
        drop(entries);
        self.clusters.free(freed.iter().copied());
        Ok(())
    }

    /// The references that are dropped when a cluster's entry is replaced by one that keeps `kept`.
    pub(in crate::qcow2) fn references(
        &self,
        old: Cluster,
        kept: Option<HostOffset>,
        punch: bool,
    ) -> Vec<Freed> {
        let geometry = self.geometry();
        match (old.compressed, old.host) {
            (Some(Compressed { offset, length }), _) => {
                let clusters = geometry.clusters_touched(offset, length);
                clusters.map(|cluster| Freed { cluster, punch: false }).collect()
            }
            (None, Some(host)) if Some(host) != kept && !self.format.has_data_file => {
                vec![Freed { cluster: geometry.host_cluster(host), punch }]
            }
            _ => Vec::new(),
        }
    }
}
