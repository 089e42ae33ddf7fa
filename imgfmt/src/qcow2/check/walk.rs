//! Counts references, from the header to every structure that it leads to.

use std::collections::HashSet;

use super::checker::{ActiveEntry, Checker, Fix, READ_AHEAD, TableUse};
use crate::error::Result;
use crate::luks;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::l2::{COPIED, OFFSET_MASK, table_of};
use crate::qcow2::on_disk::snapshot;
use crate::qcow2::on_disk::words::read_words;
use crate::units::HostOffset;

const L1_RESERVED: u64 = !(COPIED | OFFSET_MASK);
const REFCOUNT_TABLE_RESERVED: u64 = 511;
/// The maximum number of references past the end of the file that are stored one by one.
const BEYOND_MAX: usize = 1 << 20;

impl Checker<'_> {
    /// Counts the clusters that `length` bytes at `offset` touch, `weight` times. Returns whether
    /// they are in the file; the last cluster of a file may be cut short.
    pub(super) fn add(&mut self, offset: HostOffset, length: u64, weight: u64, what: &str) -> bool {
        if length == 0 {
            return true;
        }
        let geometry = self.image.geometry();
        let Some(last) = offset.checked_add(length - 1) else {
            self.damage(format!("{what} at {offset} is out of bounds"));
            return false;
        };
        let clusters = (geometry.host_cluster(offset), geometry.host_cluster(last));
        let end = last.bytes().saturating_add(1);
        if end.saturating_sub(self.file_length) >= geometry.cluster_size() {
            self.damage(format!("{what} at {offset} lies past the end of the file"));
            self.note_beyond(clusters.0, clusters.1);
            return false;
        }
        self.counts.add(clusters.0, clusters.1, weight);
        true
    }

    /// Records clusters that must not be allocated although they are not in the file.
    fn note_beyond(&mut self, first: HostCluster, last: HostCluster) {
        if last < self.file_end {
            return;
        }
        // The last one stands for all that follow.
        match self.beyond.len() < BEYOND_MAX {
            true => self.beyond.push((first, last)),
            false => {
                if let Some((lowest, highest)) = self.beyond.last_mut() {
                    *lowest = first.min(*lowest);
                    *highest = HostCluster::new(u64::MAX);
                }
            }
        }
    }

    /// Counts every reference. Returns the refcount table.
    pub(super) fn count_all(&mut self) -> Result<Vec<u64>> {
        self.find_contradictions();
        self.count_disk()?;
        let (places, damages) = self.image.bitmaps.places();
        for (offset, length) in places {
            self.is_incomplete |= !self.add(offset, length, 1, "a bitmap");
        }
        self.is_incomplete |= !damages.is_empty();
        damages.into_iter().for_each(|damage| self.damage(damage));
        self.count_refcount_structure()
    }

    /// Counts the references of the header, the present state of the disk, and its snapshots.
    pub(super) fn count_disk(&mut self) -> Result<()> {
        let image = self.image;
        let (header, geometry) = (image.metadata.header(), image.geometry());
        self.add(HostOffset::new(0), geometry.cluster_size(), 1, "the header");
        if let Some(place) = header.overlong_end {
            let message = "the mark that ends the header extensions has a length";
            let fix = Fix { place: HostOffset::new(place), new: 0, sets_copied: false };
            self.fix(fix, message.into());
        }
        self.count_luks_header();
        self.note_tables(header.l1_offset, header.l1_entries, true)?;
        let found = snapshot::read_damaged_table(&*image.metadata.file, &header)?;
        self.snapshot_damages = found.damages.len() as u64;
        found.damages.into_iter().for_each(|damage| self.damage(damage));
        let length =
            self.file_length.saturating_sub(header.snapshots_offset.bytes()).min(found.length);
        self.add(header.snapshots_offset, length, 1, "the snapshot table");
        for snapshot in &found.snapshots {
            if let Some(detail) = snapshot::l1_damage(snapshot, geometry) {
                self.damage(detail);
                self.is_incomplete = true;
                continue;
            }
            self.note_tables(snapshot.l1_offset, snapshot.l1_entries, false)?;
        }
        self.count_tables()
    }

    /// Counts the header without which the disk can never be decrypted, also if the disk is said
    /// not to be encrypted. If its place is not known, nothing may be freed.
    fn count_luks_header(&mut self) {
        let header = self.image.metadata.header();
        // Fails if one is needed that the header does not name.
        match header.luks_header().and_then(|_| header.stated_luks_header()) {
            Ok(None) => {}
            Ok(Some((offset, length))) => {
                self.is_incomplete |= !self.add(offset, length, 1, "the LUKS header");
                if self.luks_payload(offset).is_none_or(|start| start > length) {
                    let message = "the LUKS header is elsewhere, or longer, than the header says";
                    self.damage(message.into());
                    self.is_incomplete = true;
                }
            }
            Err(_) => {
                let message = "the LUKS header is missing, too large, not aligned or out of bounds";
                self.damage(message.into());
                self.is_incomplete = true;
            }
        }
    }

    /// Where a LUKS header of version 1 says that it ends, in bytes from its start; `None` if there
    /// is none.
    fn luks_payload(&self, offset: HostOffset) -> Option<u64> {
        let header = luks::read(&*self.image.metadata.file, offset.bytes()).ok()??;
        header.payload_offset.filter(|_| header.version == 1)
    }

    /// Records feature bits that contradict the rest of the header.
    fn find_contradictions(&mut self) {
        for found in self.image.metadata.header().contradictions() {
            self.report.corruptions += 1;
            self.say(found.message().to_owned());
            match found.repaired_by_clearing() {
                Some(bits) => self.false_autoclear |= bits,
                None => {
                    // Either half may be wrong, so nothing is known to be free.
                    self.is_contradictory = true;
                    self.is_incomplete = true;
                }
            }
        }
    }

    /// Records the L2 tables that an L1 table names.
    fn note_tables(
        &mut self,
        l1_offset: HostOffset,
        l1_entries: u32,
        is_active: bool,
    ) -> Result<()> {
        let image = self.image;
        if l1_entries > 0 && l1_offset.bytes() == 0 {
            self.damage("an L1 table is the header".into());
            self.is_incomplete = true;
            return Ok(());
        }
        if !self.add(l1_offset, u64::from(l1_entries) * 8, 1, "an L1 table") {
            self.is_incomplete = true;
            return Ok(());
        }
        let l1 = read_words(&*image.metadata.file, l1_offset, l1_entries as usize)?;
        for (index, &word) in l1.iter().enumerate().filter(|(_, word)| **word != 0) {
            let place = l1_offset + index as u64 * 8;
            let table = table_of(word);
            if word & L1_RESERVED != 0 {
                self.damage(format!("L1 entry {index} ({word:#x}) has reserved bits set"));
            } else if table.is_none() {
                self.fix(
                    Fix { place, new: 0, sets_copied: false },
                    format!("L1 entry {index} ({word:#x}) has the COPIED bit but no L2 table"),
                );
            }
            let Some(offset) = table else { continue };
            if is_active {
                self.active.push(ActiveEntry { place, word });
            }
            let next = self.tables.len();
            let number = *self.table_numbers.entry(offset).or_insert(next);
            match self.tables.get_mut(number) {
                Some(table) => table.weight += 1,
                None => self.tables.push(TableUse { offset, weight: 1, is_active }),
            }
        }
        Ok(())
    }

    /// Counts the L2 tables, and their references as often as the table itself is referenced.
    fn count_tables(&mut self) -> Result<()> {
        let image = self.image;
        let geometry = image.geometry();
        for number in 0..self.tables.len() {
            self.read_ahead(self.tables.get(number + READ_AHEAD).map(|table| table.offset));
            let TableUse { offset, weight, is_active } = self.tables[number];
            let is_in_file = self.add(offset, geometry.cluster_size(), weight, "an L2 table");
            if geometry.in_cluster(offset) != 0 {
                self.damage(format!("an L2 table at {offset} is not aligned"));
            } else if is_in_file {
                let words = (geometry.cluster_size() / 8) as usize;
                let words = read_words(&*image.metadata.file, offset, words)?;
                self.count_table(&words, offset, weight, is_active);
                continue;
            }
            self.is_incomplete = true;
        }
        Ok(())
    }

    /// Starts to read a table or block that will be needed soon.
    pub(super) fn read_ahead(&self, offset: Option<HostOffset>) {
        if let Some(offset) = offset {
            // Only to save time: errors show when the table is read.
            let length = self.image.geometry().cluster_size();
            let _ = self.image.metadata.file.readahead(offset, length);
        }
    }

    /// Counts the refcount table and its blocks, after everything else. If one of their clusters
    /// has another reference or an invalid place, the refcounts are unusable.
    fn count_refcount_structure(&mut self) -> Result<Vec<u64>> {
        let image = self.image;
        let (header, geometry) = (image.metadata.header(), image.geometry());
        let table_length = u64::from(header.refcount_table_clusters) << geometry.cluster_bits;
        if table_length == 0 {
            self.damage("the header names no usable refcount table".into());
            self.is_unusable = true;
            return Ok(Vec::new());
        }
        let offset = header.refcount_table_offset;
        self.count_structure(offset, table_length, "the refcount table");
        let table = read_words(&*image.metadata.file, offset, (table_length / 8) as usize)?;
        let mut seen = HashSet::new();
        for (index, &entry) in table.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            if entry & REFCOUNT_TABLE_RESERVED != 0 {
                self.damage(format!(
                    "refcount table entry {index} ({entry:#x}) has reserved bits set"
                ));
                self.is_unusable = true;
                continue;
            }
            let offset = HostOffset::new(entry);
            if geometry.in_cluster(offset) != 0 {
                self.damage(format!("a refcount block at {entry} is not aligned"));
                self.is_unusable = true;
            } else if !seen.insert(entry) {
                self.damage(format!("a refcount block at {entry} is used twice"));
                self.is_unusable = true;
            } else if entry < self.file_length && self.file_length - entry < geometry.cluster_size()
            {
                // The missing part is not taken as zero, which would mark clusters in use as free.
                self.damage(format!(
                    "a refcount block at {entry} is cut off by the end of the file"
                ));
                self.is_unusable = true;
            } else {
                self.count_structure(offset, geometry.cluster_size(), "a refcount block");
            }
        }
        Ok(table)
    }

    fn count_structure(&mut self, offset: HostOffset, length: u64, what: &str) {
        let geometry = self.image.geometry();
        if !self.add(offset, length, 1, what) {
            self.is_unusable = true;
            return;
        }
        let mut clusters = geometry.clusters_touched(offset, length);
        let last = geometry.host_cluster(offset + (length - 1));
        self.structure.push((geometry.host_cluster(offset), last));
        if let Some(cluster) = clusters.find(|at| self.counts.get(*at) > 1) {
            let place = geometry.host_offset(cluster);
            self.damage(format!("{what} at {offset} overlaps something else at {place}"));
            self.is_unusable = true;
        }
    }
}
