//! Bad entries: L2 entries through which nothing may be changed.
//!
//! A damaged or hostile image may have an L2 entry that points to a table, or to a cluster without
//! references. Reading through it is harmless. Writing through it would let the guest overwrite
//! metadata, and freeing it would free a live table. Each slice of an L2 table is therefore
//! searched once, before the first change that concerns it.
//!
//! A cluster that was free when the image was opened, for example at the end of the file, may have
//! been reserved since. So a slice that has not changed since the opening must not name a cluster
//! that was reserved after it.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Acquire;
use std::sync::{Arc, RwLockReadGuard};

use crate::error::{Error, ErrorKind, Result};
use crate::ordered_lock::Ordered;
use crate::qcow2::alloc::allocator::Allocator;
use crate::qcow2::map::mapping_tables::{L2Places, MappingTables};
use crate::qcow2::map::table::Table;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::l2::{Cluster, table_of};
use crate::qcow2::on_disk::words::read_words;
use crate::units::{GuestOffset, HostOffset, Offset as _};

/// Number of entries of snapshots' L1 tables that are read to find the L2 tables they name.
const SNAPSHOT_L1_ENTRIES_MAX: u64 = 8 << 20;

impl MappingTables {
    /// The indexes of the entries of a slice that must not be followed. `first` is the first guest
    /// offset that it maps.
    fn find_bad_entries(&self, first: GuestOffset, table: &Table) -> Result<Vec<u32>> {
        if !self.metadata.is_writable() {
            return Ok(Vec::new());
        }
        self.read_snapshot_l2s();
        let search = |tables: &Ordered<RwLockReadGuard<'_, L2Places>>,
                      allocator: &mut Allocator| {
            self.search(first, table, tables, allocator)
        };
        let bad = self.clusters.with_blocks_under(|| self.l2_places(), search)?;
        if !bad.is_empty() {
            let places = bad.iter().map(|index| self.entry_offset(table, *index));
            self.l2_places.write().bad.extend(places);
        }
        Ok(bad)
    }

    fn search(
        &self,
        first: GuestOffset,
        table: &Table,
        tables: &L2Places,
        allocator: &mut Allocator,
    ) -> Result<Vec<u32>> {
        let geometry = self.geometry();
        let is_new = allocator.reserved_since_open.contains(geometry.host_cluster(table.offset));
        let mut bad = Vec::new();
        for index in 0..self.slices.entries() {
            let guest = first + (index << geometry.cluster_bits);
            let place = self.entry_offset(table, index as u32);
            let is_as_found =
                !is_new && !tables.changed.contains(&place.round_down(self.slices.unit()));
            if tables.bad.contains(&place) {
                bad.push(index as u32);
                continue;
            }
            // Every user of an entry refuses it if it cannot be decoded.
            let Ok(cluster) = self.decode(table, guest) else { continue };
            if self.is_bad(cluster, guest, &tables.named, allocator)?
                || is_as_found && self.names_reserved(cluster, allocator)
            {
                bad.push(index as u32);
            }
        }
        Ok(bad)
    }

    /// The offset of an entry of a slice in the file.
    pub(super) fn entry_offset(&self, table: &Table, index: u32) -> HostOffset {
        table.offset + u64::from(index) * 8 * self.geometry().entry_words() as u64
    }

    /// Whether an entry of an unchanged table names a cluster that was free when the image was
    /// opened.
    fn names_reserved(&self, cluster: Cluster, allocator: &Allocator) -> bool {
        let references = self.references(cluster, None, false);
        references.iter().any(|it| allocator.reserved_since_open.contains(it.cluster))
    }

    /// Reads the places of the snapshots' L2 tables. Tables that cannot be read, or are beyond the
    /// limit, stay unknown.
    fn read_snapshot_l2s(&self) {
        self.snapshot_l2s.get_or_init(|| {
            let mut found = HashSet::new();
            let mut entries_left = SNAPSHOT_L1_ENTRIES_MAX;
            for (offset, entries) in &self.snapshot_l1s {
                let Some(left) = entries_left.checked_sub(u64::from(*entries)) else { break };
                entries_left = left;
                let words = read_words(&*self.metadata.file, *offset, *entries as usize);
                found.extend(words.unwrap_or_default().into_iter().filter_map(table_of));
            }
            found
        });
    }

    fn is_bad(
        &self,
        cluster: Cluster,
        guest: GuestOffset,
        tables: &HashSet<HostOffset>,
        allocator: &mut Allocator,
    ) -> Result<bool> {
        if self.format.has_data_file {
            // Offsets in a data file are those of the disk.
            return Ok(cluster.host.is_some_and(|host| host.bytes() != guest.bytes()));
        }
        let geometry = self.geometry();
        for reference in self.references(cluster, None, false) {
            let offset = geometry.host_offset(reference.cluster);
            let is_table = allocator.is_protected(offset)
                || tables.contains(&offset)
                || self.snapshot_l2s.get().is_some_and(|known| known.contains(&offset))
                || self.other_places.iter().any(|place| place.contains(&offset));
            let is_counted = match allocator.refcounts.refcount(reference.cluster) {
                Ok(count) => count > 0,
                // Damaged refcounts must not make the other entries unwritable.
                Err(error) if error.kind() == ErrorKind::Corrupt => false,
                Err(error) => return Err(error),
            };
            if is_table || !is_counted {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a cluster that a structure claims is known to hold other metadata, or to have no
    /// references.
    pub(in crate::qcow2) fn is_metadata(&self, offset: HostOffset) -> Result<bool> {
        let cluster = Cluster { host: Some(offset), ..Cluster::default() };
        let tables = self.l2_places();
        let mut allocator = self.clusters.allocator()?;
        if self.format.has_data_file {
            return Ok(allocator.is_protected(offset) || tables.named.contains(&offset));
        }
        self.is_bad(cluster, GuestOffset::new(0), &tables.named, &mut allocator)
    }

    /// Refuses to free L2 tables, from this L1 entry on, that hold other metadata, have no
    /// references or belong to other L1 entries as well.
    pub(in crate::qcow2) fn refuse_bad_tables(&self, first: u64) -> Result<()> {
        let mut known = HashSet::new();
        for (index, entry) in (0..).zip(self.l1.iter()) {
            let Some(offset) = table_of(entry.load(Acquire)) else { continue };
            if !known.insert(offset) && index >= first {
                return Err(self.not_its_own(offset));
            }
            if index >= first {
                self.refuse_bad_table(offset)?;
            }
        }
        Ok(())
    }

    /// Refuses to count or to free an L2 table that holds other metadata or has no references.
    pub(in crate::qcow2) fn refuse_bad_table(&self, offset: HostOffset) -> Result<()> {
        let mut allocator = self.clusters.allocator()?;
        let is_other = allocator.is_protected(offset)
            || self.other_places.iter().any(|place| place.contains(&offset))
            || allocator.refcounts.refcount(self.geometry().host_cluster(offset))? == 0;
        drop(allocator);
        if is_other { Err(self.not_its_own(offset)) } else { Ok(()) }
    }

    /// Refuses to count or to free a cluster that an entry of the L2 table at `table` names, if it
    /// holds metadata or has no references.
    pub(in crate::qcow2) fn refuse_bad_cluster(
        &self,
        cluster: Cluster,
        table: HostOffset,
    ) -> Result<()> {
        let tables = self.l2_places();
        let mut allocator = self.clusters.allocator()?;
        let is_bad = self.is_bad(cluster, GuestOffset::new(0), &tables.named, &mut allocator)?;
        drop((tables, allocator));
        match is_bad {
            true => Err(self.metadata.note_damage(
                self.metadata
                    .corrupt("an L2 entry points to metadata or to nothing", table.bytes()),
            )),
            false => Ok(()),
        }
    }

    fn not_its_own(&self, offset: HostOffset) -> Error {
        let detail = "an L1 entry points to a table that is not its own";
        self.metadata.note_damage(self.metadata.corrupt(detail, offset.bytes()))
    }

    /// The entries of a slice that must not be followed. `first` is the first guest offset that it
    /// maps.
    pub(super) fn bad_entries<'a>(
        &self,
        table: &'a Table,
        first: GuestOffset,
    ) -> Result<&'a [u32]> {
        if let Some(known) = table.bad_entries.get() {
            return Ok(known);
        }
        // The table must not change meanwhile.
        let _unchanged = table.change();
        let found = self.find_bad_entries(first, table)?;
        Ok(table.bad_entries.get_or_init(|| found))
    }

    /// The offsets of the bad entries of a complete table, in bytes from its start. Each slice
    /// comes with the first guest offset that it maps.
    pub(super) fn bad_places(&self, slices: &[(Arc<Table>, GuestOffset)]) -> Result<Vec<u64>> {
        let mut places = Vec::new();
        for (slice, first) in slices {
            for index in self.bad_entries(slice, *first)? {
                places.push(self.geometry().in_cluster(self.entry_offset(slice, *index)));
            }
        }
        Ok(places)
    }

    /// Refuses a change through an entry that must not be followed.
    pub(in crate::qcow2) fn refuse_bad(&self, table: &Table, guest: GuestOffset) -> Result<()> {
        let bad_entries = match table.bad_entries.get() {
            Some(known) => known,
            None => self.bad_entries(table, guest.round_down(self.slices.coverage()))?,
        };
        // Sound images have none.
        if bad_entries.is_empty() {
            return Ok(());
        }
        let index = self.slices.index(guest) as u32;
        match bad_entries.binary_search(&index) {
            Ok(_) => {
                let detail = "an L2 entry points to metadata or to nothing";
                Err(self.metadata.note_damage(self.metadata.corrupt(detail, guest.bytes())))
            }
            Err(_) => Ok(()),
        }
    }

    /// Records the places of all other metadata for the refcounts, so that no refcount block that
    /// overlaps them is written. Data clusters are not included: finding them would need all L2
    /// tables.
    pub(in crate::qcow2) fn note_metadata(&self) {
        let geometry = self.geometry();
        let tables = self.l2_places();
        let Ok(mut allocator) = self.clusters.allocator() else { return };
        let places = allocator.protected.iter().chain(&self.other_places);
        let places = places.filter(|place| !place.is_empty());
        let mut clusters: Vec<HostCluster> = places
            .flat_map(|place| geometry.clusters_touched(place.start, place.end - place.start))
            .collect();
        clusters.extend(tables.named.iter().map(|offset| geometry.host_cluster(*offset)));
        allocator.refcounts.note_others(clusters);
    }
}

impl Allocator {
    /// Whether the header, the L1 table, the refcount table or one of its blocks is there.
    fn is_protected(&self, offset: HostOffset) -> bool {
        let new_table = self.new_table_place.map(|place| place.range(self.refcounts.geometry));
        let mut places = self.protected.iter().chain(&new_table);
        places.any(|place| place.contains(&offset)) || self.refcounts.is_block(offset)
    }
}
