//! Entries that must not be followed when something is changed.
//!
//! A damaged or hostile image may have an L2 entry that points to a table, or to a place that
//! nothing has ever been given. Reading through it is harmless. Writing through it would hand the
//! image's metadata to the guest, and freeing it would give a live table away. Each L2 table is
//! therefore looked through once, before the first change that concerns it.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Acquire;

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::allocator::Allocator;
use crate::qcow2::map::cache::Table;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::on_disk::l2::{Cluster, OFFSET_MASK};

impl MappingTables {
    /// The indexes of a table's entries that must not be followed.
    fn find_bad_entries(&self, l1_index: u64, words: &[u64]) -> Result<Vec<u32>> {
        if !self.metadata.is_writable() {
            return Ok(Vec::new());
        }
        let geometry = self.geometry();
        let tables = self.l2_places();
        let mut allocator = self.clusters.allocator()?;
        let mut bad = Vec::new();
        for (index, entry) in words.chunks_exact(geometry.entry_words()).enumerate() {
            let bitmap = entry.get(1).copied().unwrap_or(0);
            // What cannot be decoded is refused wherever it is met.
            let Ok(cluster) = self.format.decode(entry[0], bitmap) else { continue };
            let guest =
                l1_index * geometry.l2_coverage() + ((index as u64) << geometry.cluster_bits);
            if self.is_bad(cluster, guest, &tables, &mut allocator)? {
                bad.push(index as u32);
            }
        }
        Ok(bad)
    }

    fn is_bad(
        &self,
        cluster: Cluster,
        guest: u64,
        tables: &HashSet<u64>,
        allocator: &mut Allocator,
    ) -> Result<bool> {
        if self.format.has_data_file {
            // Data has the same place in a data file as on the disk.
            return Ok(cluster.host.is_some_and(|host| host != guest));
        }
        let bits = self.geometry().cluster_bits;
        for reference in self.references(cluster, None, false) {
            let offset = reference.cluster << bits;
            let is_table = allocator.is_protected(offset)
                || tables.contains(&offset)
                || self.snapshot_places.iter().any(|(start, end)| (*start..*end).contains(&offset));
            let is_counted = match allocator.refcounts.refcount(reference.cluster) {
                Ok(count) => count > 0,
                // Damaged refcounts must not keep anyone from reading.
                Err(error) if error.kind() == ErrorKind::Corrupt => false,
                Err(error) => return Err(error),
            };
            if is_table || !is_counted {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a place that something claims as its own is known to be another's, or nobody's.
    pub(in crate::qcow2) fn is_metadata(&self, offset: u64) -> Result<bool> {
        let cluster = Cluster { host: Some(offset), ..Cluster::default() };
        let tables = self.l2_places();
        let mut allocator = self.clusters.allocator()?;
        if self.format.has_data_file {
            return Ok(allocator.is_protected(offset) || tables.contains(&offset));
        }
        self.is_bad(cluster, 0, &tables, &mut allocator)
    }

    /// Refuses to give L2 tables away, from this L1 entry on, that are other metadata, or nobody's,
    /// or the tables of other L1 entries as well.
    pub(in crate::qcow2) fn refuse_bad_tables(&self, first: u64) -> Result<()> {
        let mut known = HashSet::new();
        for (index, entry) in (0..).zip(self.l1.iter()) {
            let offset = entry.load(Acquire) & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            if !known.insert(offset) && index >= first {
                return Err(self.not_its_own(offset));
            }
            if index >= first {
                self.refuse_bad_table(offset)?;
            }
        }
        Ok(())
    }

    /// Refuses to count or to give away an L2 table that is other metadata, or nobody's.
    pub(in crate::qcow2) fn refuse_bad_table(&self, offset: u64) -> Result<()> {
        let mut allocator = self.clusters.allocator()?;
        let is_other = allocator.is_protected(offset)
            || self.snapshot_places.iter().any(|(start, end)| (*start..*end).contains(&offset))
            || allocator.refcounts.refcount(offset >> self.geometry().cluster_bits)? == 0;
        drop(allocator);
        if is_other { Err(self.not_its_own(offset)) } else { Ok(()) }
    }

    /// Refuses to count or to give away what an entry of the L2 table at `table` refers to, if it
    /// is metadata, or nobody's.
    pub(in crate::qcow2) fn refuse_bad_cluster(&self, cluster: Cluster, table: u64) -> Result<()> {
        let tables = self.l2_places();
        let mut allocator = self.clusters.allocator()?;
        let is_bad = self.is_bad(cluster, 0, &tables, &mut allocator)?;
        drop((tables, allocator));
        match is_bad {
            true => Err(self.metadata.note_damage(
                self.metadata.corrupt("an L2 entry points to metadata or to nothing", table),
            )),
            false => Ok(()),
        }
    }

    fn not_its_own(&self, offset: u64) -> Error {
        let detail = "an L1 entry points to a place that is not its own";
        self.metadata.note_damage(self.metadata.corrupt(detail, offset))
    }

    /// Refuses a change through an entry that must not be followed. `words` are the table's, and
    /// the caller holds its lock: nobody can have changed them unseen.
    pub(in crate::qcow2) fn refuse_bad(
        &self,
        table: &Table,
        words: &[u64],
        guest: u64,
    ) -> Result<()> {
        let bad_entries = match table.bad_entries.get() {
            Some(known) => known,
            None => {
                let found = self.find_bad_entries(self.geometry().l1_index(guest), words)?;
                table.bad_entries.get_or_init(|| found)
            }
        };
        // Nearly always there is none.
        if bad_entries.is_empty() {
            return Ok(());
        }
        let index = self.geometry().l2_index(guest) as u32;
        match bad_entries.binary_search(&index) {
            Ok(_) => {
                let error =
                    self.metadata.corrupt("an L2 entry points to metadata or to nothing", guest);
                Err(self.metadata.note_damage(error))
            }
            Err(_) => Ok(()),
        }
    }

    /// Tells the refcounts where everything else is, so that none of their blocks is written that
    /// is something else. What the guest's data occupies would take a look at all L2 tables.
    pub(in crate::qcow2) fn note_metadata(&self) {
        let geometry = self.geometry();
        let tables = self.l2_places();
        let Ok(mut allocator) = self.clusters.allocator() else { return };
        let places = allocator.protected.iter().chain(&self.snapshot_places);
        let places = places.filter(|(start, end)| start < end);
        let mut clusters: Vec<u64> = places
            .flat_map(|(start, end)| {
                start >> geometry.cluster_bits..=(end - 1) >> geometry.cluster_bits
            })
            .collect();
        clusters.extend(tables.iter().map(|offset| offset >> geometry.cluster_bits));
        allocator.refcounts.note_others(clusters);
    }
}

impl Allocator {
    /// Whether the header, the L1 table, the refcount table or one of its blocks lies there.
    fn is_protected(&self, offset: u64) -> bool {
        let inside = |(start, end): &(u64, u64)| (*start..*end).contains(&offset);
        let new_table = self.new_table_place.map(|place| {
            let length = place.clusters << self.refcounts.geometry.cluster_bits;
            (place.offset, place.offset.saturating_add(length))
        });
        self.protected.iter().chain(&new_table).any(inside) || self.refcounts.is_block(offset)
    }
}
