//! L2 tables for changes: created where there is none, copied where a snapshot shares them.

use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use crate::error::Result;
use crate::qcow2::alloc::allocator::Freed;
use crate::qcow2::alloc::clusters::CountReferences;
use crate::qcow2::map::lookup::Lookup;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::map::table::Table;
use crate::qcow2::on_disk::l2::{COPIED, Cluster, Compressed};
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

    /// The table of an L1 entry, made or moved so that it may be changed.
    pub(in crate::qcow2) fn table_for_write(
        &self,
        l1_index: u64,
        references: &impl CountReferences,
    ) -> Result<Arc<Table>> {
        self.metadata.refuse_unwritable()?;
        if let Some(table) = self.own_table(l1_index)? {
            return Ok(table);
        }
        let _changing = self.l1_change.lock();
        if let Some(table) = self.own_table(l1_index)? {
            return Ok(table);
        }
        let geometry = self.geometry();
        let shared = match self.table(l1_index, Lookup::MayRead)? {
            Some(Some(table)) => Some(table),
            _ => None,
        };
        let words = match &shared {
            Some(table) => table.words(),
            None => vec![0; (geometry.cluster_size() / 8) as usize],
        };
        // Before it is copied: what is bad in it is bad in the copy.
        let bad_entries = match &shared {
            Some(table) => self.bad_entries(table, l1_index)?.to_vec(),
            None => Vec::new(),
        };
        let reserved = self.clusters.reserve(1, references)?;
        // Written whole now, so that a full disk is noticed now and not by a flush.
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let offset = reserved.offset;
        if let Err(error) = self.metadata.file.write_at(offset, &bytes, Durability::Cached) {
            self.clusters.release(&[reserved]);
            let guest = geometry.table_start(l1_index);
            return Err(self.metadata.io("write an L2 table of", error, guest));
        }
        let table = Arc::new(Table::new(offset, words));
        // Nor is it known to be on disk before a flush has written it again and synced.
        table.change().mark_dirty(0, table.len());
        self.tables.note_dirty();
        let _gate = self.commits.enter_gate();
        let mut places = self.l2_places.write();
        places.named.insert(offset);
        // The former content of that place is gone.
        places.bad.remove(&offset);
        if !bad_entries.is_empty() {
            places.bad.insert(offset, bad_entries);
        }
        if let Some(shared) = &shared {
            places.named.remove(&shared.offset);
        }
        drop(places);
        self.tables.insert(Arc::clone(&table));
        self.set_l1(l1_index as usize, offset.bytes() | COPIED);
        let replaced = shared.map(|shared| geometry.host_cluster(shared.offset));
        self.clusters.free(replaced.map(|cluster| Freed { cluster, punch: false }));
        Ok(table)
    }

    /// The table of an L1 entry, if it is in memory, may be changed, and nothing more needs to be
    /// found out about it.
    pub(in crate::qcow2) fn own_table_in_memory(
        &self,
        l1_index: u64,
    ) -> Result<Option<Arc<Table>>> {
        if !self.l1_is_copied(l1_index) {
            return Ok(None);
        }
        let table = self.table(l1_index, Lookup::CachedOnly)?.flatten();
        Ok(table.filter(|table| table.bad_entries.get().is_some()))
    }

    fn own_table(&self, l1_index: u64) -> Result<Option<Arc<Table>>> {
        if !self.l1_is_copied(l1_index) {
            return Ok(None);
        }
        Ok(self.table(l1_index, Lookup::MayRead)?.flatten())
    }

    /// Makes changes of mappings visible, and frees the clusters that they replaced. The caller holds
    /// the stripes of all clusters concerned, and the data they point to has been written.
    pub(in crate::qcow2) fn commit(
        &self,
        table: &Table,
        changes: &[Change],
        freed: &[Freed],
    ) -> Result<()> {
        self.metadata.refuse_unwritable()?;
        let words_per_entry = self.geometry().entry_words();
        let _gate = self.commits.enter_gate();
        // Before any entry names what was reserved.
        if !self.l2_places().changed.contains(&table.offset) {
            self.l2_places.write().changed.insert(table.offset);
        }
        let mut entries = table.change();
        for change in changes {
            let index = self.geometry().l2_index(change.guest) * words_per_entry;
            if entries.set(index, words_per_entry, self.format.encode(change.cluster)) {
                self.tables.note_dirty();
            }
        }
        drop(entries);
        self.clusters.free(freed.iter().copied());
        Ok(())
    }

    /// The references that go away when a cluster's entry is replaced by one that keeps `kept`.
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
