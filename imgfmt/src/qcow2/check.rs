//! Checking: every reference in the file is counted and compared with the refcounts.
//!
//! A refcount that is too high is a *leak*: space is lost, data is safe. One that is too low, a wrong
//! COPIED bit, or a reference to a place that cannot be is a *corruption*. Repair makes refcounts
//! and COPIED bits what they should be; references to impossible places it leaves alone.

mod counts;
mod flags;

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::Qcow2;
use super::header::{field, incompatible};
use super::l2::{COPIED, OFFSET_MASK};
use super::open::read_words;
use super::refcount::Refcounts;
use super::snapshot;
use super::writer::lock;
use crate::error::{Error, ErrorKind, Result};
use crate::units::HostOffset;
use counts::Counts;
use flags::{ActiveTable, Flag};

/// What may be repaired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Repair {
    /// Nothing: the image is only read.
    #[default]
    None,
    /// Refcounts that are too high.
    Leaks,
    /// Whatever can be.
    All,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Clusters that are counted as used more often than they are.
    pub leaks: u64,
    /// Damages that endanger data.
    pub corruptions: u64,
    /// Leaks that were repaired; not contained in `leaks`.
    pub leaks_repaired: u64,
    /// Damages that were repaired; not contained in `corruptions`.
    pub corruptions_repaired: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters of the disk whose data lies in this image.
    pub allocated_clusters: u64,
    /// Of these, clusters that are compressed.
    pub compressed_clusters: u64,
    /// Of these, clusters that do not lie behind the one before.
    pub fragmented_clusters: u64,
    /// Where the part of the file that is in use ends, in bytes.
    pub image_end_offset: u64,
    /// What was found, in words; the first hundred of each check.
    pub messages: Vec<String>,
}

const MESSAGES_MAX: usize = 100;
/// How many tables ahead of the one that is looked at reading begins.
const READ_AHEAD: usize = 16;
const L1_RESERVED: u64 = !(COPIED | OFFSET_MASK);

struct Checker<'a> {
    image: &'a Qcow2,
    counts: Counts,
    file_clusters: u64,
    report: CheckReport,
    /// L2 tables of the present state that were counted, with the places of their L1 entries.
    tables: Vec<ActiveTable>,
    /// L1 entries and L2 words whose COPIED bit is wrong.
    wrong_flags: Vec<Flag>,
    /// The refcount table itself is damaged: nothing can be repaired by it.
    refcounts_unusable: bool,
}

impl Qcow2 {
    /// Checks and, if asked to, repairs. Nobody else may use the image meanwhile.
    pub(crate) fn check(&self, repair: Repair) -> Result<CheckReport> {
        if self.writer.is_some() && repair != Repair::None {
            // Whoever repairs after a crash, before bitmaps are recovered, must not be taken for a
            // foreign writer.
            drop(self.find_sidecar()?);
        }
        self.check_with_sidecar(repair)
    }

    /// The same for who has looked at the sidecar already, and holds it.
    pub(super) fn check_with_sidecar(&self, repair: Repair) -> Result<CheckReport> {
        if self.writer.is_some() {
            self.flush_all()?;
        }
        let length = self.file.len().map_err(super::header::read_error)?;
        let mut checker = Checker {
            image: self,
            counts: Counts::default(),
            file_clusters: self.geometry().clusters_of(length),
            report: CheckReport {
                total_clusters: self.geometry().clusters_of(self.header.size),
                ..CheckReport::default()
            },
            tables: Vec::new(),
            wrong_flags: Vec::new(),
            refcounts_unusable: false,
        };
        let table_words =
            u64::from(self.header.refcount_table_clusters) << (self.geometry().cluster_bits - 3);
        let table =
            read_words(&*self.file, self.header.refcount_table_offset, table_words as usize)?;
        checker.count_all(&table)?;
        let mut fresh = Refcounts::new(Arc::clone(&self.file), self.geometry(), table);
        match &self.writer {
            Some(writer) if repair != Repair::None && !checker.refcounts_unusable => {
                let mut allocator = lock(&writer.allocator);
                checker.compare(&mut allocator.refcounts, repair)?;
                checker.find_wrong_flags(&mut allocator.refcounts)?;
                drop(allocator);
                writer.note_change();
                self.flush_all()?;
            }
            _ => {
                checker.compare(&mut fresh, Repair::None)?;
                checker.find_wrong_flags(&mut fresh)?;
            }
        }
        let wrong_flags = checker.wrong_flags.len() as u64;
        if repair == Repair::All && !checker.refcounts_unusable {
            checker.repair_flags()?;
            checker.report.corruptions_repaired += wrong_flags;
            self.sync_file()?;
            self.drop_damaged_bitmaps(&mut checker.report)?;
            self.clear_marks(&checker.report)?;
        } else {
            checker.report.corruptions += wrong_flags;
        }
        Ok(checker.report)
    }

    /// Removes the marks of an image that is damaged or was not closed, now that it is sound.
    fn clear_marks(&self, report: &CheckReport) -> Result<()> {
        let marks = incompatible::DIRTY | incompatible::CORRUPT;
        if report.corruptions > 0 || self.header.incompatible & marks == 0 {
            return Ok(());
        }
        let features = self.header.incompatible & !marks;
        self.write_metadata(field::INCOMPATIBLE, &features.to_be_bytes())?;
        self.sync_file()
    }
}

impl Checker<'_> {
    fn corruption(&mut self, message: String) {
        self.report.corruptions += 1;
        self.say(message);
    }

    fn say(&mut self, message: String) {
        if self.report.messages.len() < MESSAGES_MAX {
            self.report.messages.push(message);
        }
    }

    /// Counts the clusters that `length` bytes at `offset` touch.
    fn add(&mut self, offset: u64, length: u64, what: &str) {
        let bits = self.image.geometry().cluster_bits;
        let Some(last) = offset.checked_add(length.max(1) - 1) else {
            return self.corruption(format!("{what} at {offset} goes beyond all bounds"));
        };
        if last >> bits >= self.file_clusters {
            return self.corruption(format!("{what} at {offset} lies behind the end of the file"));
        }
        self.counts.add(offset >> bits, last >> bits);
    }

    fn count_all(&mut self, table: &[u64]) -> Result<()> {
        let image = self.image;
        let (header, geometry) = (&image.header, image.geometry());
        self.add(0, geometry.cluster_size(), "the header");
        self.count_tree(header.l1_offset, header.l1_entries, true)?;
        let snapshots = snapshot::read_table(&*image.file, header)?;
        let length = snapshot::table_length(&snapshots);
        if length > 0 {
            self.add(header.snapshots_offset, length, "the snapshot table");
        }
        for snapshot in &snapshots {
            self.count_tree(snapshot.l1_offset, snapshot.l1_entries, false)?;
        }
        let (places, damages) = image.bitmap_places();
        for (offset, length) in places {
            self.add(offset, length, "a bitmap");
        }
        damages.into_iter().for_each(|damage| self.corruption(damage));
        let table_length = table.len() as u64 * 8;
        self.add(header.refcount_table_offset, table_length, "the refcount table");
        let mut seen = HashSet::new();
        for entry in table.iter().filter(|entry| **entry != 0) {
            let before = self.report.corruptions;
            if !seen.insert(*entry) {
                self.corruption(format!("a refcount block at {entry} is used twice"));
            } else if geometry.in_cluster(*entry) != 0 {
                self.corruption(format!("a refcount block at {entry} is not aligned"));
            } else {
                self.add(*entry, geometry.cluster_size(), "a refcount block");
            }
            self.refcounts_unusable |= self.report.corruptions > before;
        }
        Ok(())
    }

    fn count_tree(&mut self, l1_offset: u64, l1_entries: u32, is_active: bool) -> Result<()> {
        if l1_entries == 0 {
            return Ok(());
        }
        let image = self.image;
        let geometry = image.geometry();
        self.add(l1_offset, u64::from(l1_entries) * 8, "an L1 table");
        let l1 = read_words(&*image.file, l1_offset, l1_entries as usize)?;
        let mut seen = HashSet::new();
        for (index, &entry) in l1.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            if entry & L1_RESERVED != 0 {
                self.corruption(format!("L1 entry {index} ({entry:#x}) has reserved bits set"));
            }
            let offset = entry & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            if geometry.in_cluster(offset) != 0 {
                self.corruption(format!("an L2 table at {offset} is not aligned"));
                continue;
            }
            self.read_ahead(l1.get(index + READ_AHEAD).map_or(0, |entry| entry & OFFSET_MASK));
            let before = self.report.corruptions;
            if !seen.insert(offset) {
                self.corruption(format!("an L2 table at {offset} is used twice"));
            }
            self.add(offset, geometry.cluster_size(), "an L2 table");
            let is_sound = self.report.corruptions == before;
            if is_active {
                let l1_place = l1_offset + index as u64 * 8;
                self.tables.push(ActiveTable { l1_place, l1_entry: entry, is_sound });
            }
            if is_sound {
                self.count_table(offset, is_active)?;
            }
        }
        Ok(())
    }

    /// Starts to read a table or block that will be needed soon.
    fn read_ahead(&self, offset: u64) {
        if offset != 0 {
            // Only to save time: what is wrong there shows when it is read.
            let length = self.image.geometry().cluster_size();
            let _ = self.image.file.readahead(HostOffset::new(offset), length);
        }
    }

    fn count_table(&mut self, offset: u64, is_active: bool) -> Result<()> {
        let image = self.image;
        let geometry = image.geometry();
        let words = read_words(&*image.file, offset, (geometry.cluster_size() / 8) as usize)?;
        let mut expected_next = 0;
        // Clusters that follow each other are counted at once.
        let mut run = 0..0;
        for entry in words.chunks_exact(geometry.entry_words()) {
            let (word, bitmap) = (entry[0], entry.get(1).copied().unwrap_or(0));
            if word == 0 && bitmap == 0 {
                continue;
            }
            let cluster = match image.format.decode(word, bitmap) {
                Ok(cluster) => cluster,
                Err(detail) => {
                    self.corruption(format!("{detail} ({word:#x})"));
                    continue;
                }
            };
            if let Some(compressed) = cluster.compressed {
                if word & COPIED != 0 {
                    self.corruption(format!("a compressed cluster has the COPIED bit ({word:#x})"));
                }
                // The last one may say more sectors than the file has.
                let end = self.file_clusters << geometry.cluster_bits;
                let length = compressed.length.min(end.saturating_sub(compressed.offset)).max(1);
                self.add(compressed.offset, length, "a compressed cluster");
                self.report.allocated_clusters += u64::from(is_active);
                self.report.compressed_clusters += u64::from(is_active);
            } else if let Some(host) = cluster.host {
                if is_active {
                    self.report.allocated_clusters += 1;
                    let is_fragmented = expected_next != 0 && expected_next != host;
                    self.report.fragmented_clusters += u64::from(is_fragmented);
                    expected_next = host + geometry.cluster_size();
                }
                if image.format.has_data_file {
                    continue;
                }
                if run.end != host || run.is_empty() {
                    self.add_run(run);
                    run = host..host;
                }
                run.end += geometry.cluster_size();
            }
        }
        self.add_run(run);
        Ok(())
    }

    /// Counts data clusters that follow each other.
    fn add_run(&mut self, run: Range<u64>) {
        let geometry = self.image.geometry();
        if geometry.clusters_of(run.end) <= self.file_clusters {
            let bits = geometry.cluster_bits;
            if !run.is_empty() {
                self.counts.add(run.start >> bits, (run.end >> bits) - 1);
            }
            return;
        }
        // Each one that cannot be is a damage.
        for host in run.step_by(geometry.cluster_size() as usize) {
            self.add(host, geometry.cluster_size(), "a data cluster");
        }
    }

    /// Compares all refcounts with what was counted.
    fn compare(&mut self, refcounts: &mut Refcounts, repair: Repair) -> Result<()> {
        if self.refcounts_unusable {
            return Ok(());
        }
        let indexes: Vec<usize> = self.block_indexes(refcounts).into_iter().collect();
        for (position, &index) in indexes.iter().enumerate() {
            let later = indexes.get(position + READ_AHEAD);
            self.read_ahead(
                later.and_then(|index| refcounts.table.get(*index)).map_or(0, |at| *at),
            );
            self.compare_block(refcounts, index, repair)?;
        }
        Ok(())
    }

    /// The indexes of refcount blocks that exist or that should, because something refers to a
    /// cluster they would count.
    fn block_indexes(&self, refcounts: &Refcounts) -> BTreeSet<usize> {
        let entries = self.image.geometry().block_entries();
        let existing = refcounts.table.iter().enumerate().filter(|(_, offset)| **offset != 0);
        let mut indexes: BTreeSet<usize> = existing.map(|(index, _)| index).collect();
        for (first, last) in self.counts.parts() {
            indexes.extend((first / entries..=last / entries).map(|block| block as usize));
        }
        indexes
    }

    fn compare_block(
        &mut self,
        refcounts: &mut Refcounts,
        index: usize,
        repair: Repair,
    ) -> Result<()> {
        let geometry = self.image.geometry();
        let has_block = refcounts.has_block(index);
        let first = index as u64 * geometry.block_entries();
        // Nothing lies behind the end of the file that could leak.
        let end = (first + geometry.block_entries()).min(self.file_clusters);
        let mut wrong = Vec::new();
        let mut last_used = None;
        let block = refcounts.block_view(index)?;
        self.counts.for_each(first, end, |cluster, should| {
            let is = block.refcount((cluster - first) as usize);
            if is.max(should) > 0 {
                last_used = Some(cluster);
            }
            if is != should {
                wrong.push((cluster, is, should));
            }
        });
        if let Some(cluster) = last_used {
            self.report.image_end_offset = (cluster + 1) << geometry.cluster_bits;
        }
        for (cluster, is, should) in wrong {
            let may = match repair {
                Repair::None => false,
                Repair::Leaks => is > should,
                Repair::All => has_block,
            };
            let done = may && refcounts.set_refcount(cluster, should).is_ok();
            self.say(format!("cluster {cluster} has refcount {is}, should be {should}"));
            match (is > should, done) {
                (true, true) => self.report.leaks_repaired += 1,
                (true, false) => self.report.leaks += 1,
                (false, true) => self.report.corruptions_repaired += 1,
                (false, false) => self.report.corruptions += 1,
            }
        }
        Ok(())
    }
}

/// The error of opening an image for writing that could not be repaired.
pub(super) fn not_repaired(report: &CheckReport) -> Error {
    let detail = format!(
        "it was not closed properly, and {} damages remain after repair; open it read-only and save \
         what can be read",
        report.corruptions
    );
    Error::new(ErrorKind::Corrupt, "repair", detail)
}
