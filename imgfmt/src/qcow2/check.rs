//! Checking: every reference in the file is counted and compared with the refcounts.
//!
//! A refcount that is too high is a *leak*: space is lost, data is safe. One that is too low, a wrong
//! COPIED bit, or a reference to a place that cannot be is a *corruption*. Repair makes refcounts
//! and COPIED bits what they should be; references to impossible places it leaves alone.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::Qcow2;
use super::bitmaps;
use super::header::{field, incompatible};
use super::l2::{COPIED, OFFSET_MASK};
use super::open::read_words;
use super::refcount::Refcounts;
use super::snapshot;
use super::writer::lock;
use crate::error::{Error, ErrorKind, Result};

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
const L1_RESERVED: u64 = !(COPIED | OFFSET_MASK);

/// Counts by cluster. Memory is taken for parts of the file that something refers to.
#[derive(Debug, Default)]
struct Counts(HashMap<u64, Box<[u32]>>);

const CHUNK: u64 = 4096;

impl Counts {
    fn add(&mut self, cluster: u64) {
        let chunk = self.0.entry(cluster / CHUNK).or_insert_with(|| vec![0; CHUNK as usize].into());
        let count = &mut chunk[(cluster % CHUNK) as usize];
        *count = count.saturating_add(1);
    }

    fn of(&self, cluster: u64) -> u64 {
        self.0
            .get(&(cluster / CHUNK))
            .map_or(0, |chunk| u64::from(chunk[(cluster % CHUNK) as usize]))
    }
}

struct Checker<'a> {
    image: &'a Qcow2,
    counts: Counts,
    file_clusters: u64,
    report: CheckReport,
    /// L1 entries and L2 words whose COPIED bit is to be compared: place, value, cluster.
    flags: Vec<Flag>,
    /// The refcount table itself is damaged: nothing can be repaired by it.
    refcounts_unusable: bool,
}

struct Flag {
    /// Where the word lies in the file.
    place: u64,
    word: u64,
    cluster: u64,
}

impl Qcow2 {
    /// Checks and, if asked to, repairs. Nobody else may use the image meanwhile.
    pub(crate) fn check(&self, repair: Repair) -> Result<CheckReport> {
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
            flags: Vec::new(),
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
        let wrong_flags = checker.flags.len() as u64;
        if repair == Repair::All && !checker.refcounts_unusable {
            checker.repair_flags()?;
            checker.report.corruptions_repaired += wrong_flags;
            self.sync_file()?;
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
        for cluster in offset >> bits..=last >> bits {
            self.counts.add(cluster);
        }
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
        for (offset, length) in bitmaps::places(&*image.file, header)? {
            self.add(offset, length, "a bitmap");
        }
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
        for (index, entry) in l1.into_iter().enumerate().filter(|(_, entry)| *entry != 0) {
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
            let before = self.report.corruptions;
            if !seen.insert(offset) {
                self.corruption(format!("an L2 table at {offset} is used twice"));
            }
            self.add(offset, geometry.cluster_size(), "an L2 table");
            if is_active {
                let place = l1_offset + index as u64 * 8;
                self.flags.push(Flag {
                    place,
                    word: entry,
                    cluster: offset >> geometry.cluster_bits,
                });
            }
            if self.report.corruptions == before {
                self.count_table(offset, is_active)?;
            }
        }
        Ok(())
    }

    fn count_table(&mut self, offset: u64, is_active: bool) -> Result<()> {
        let image = self.image;
        let geometry = image.geometry();
        let words = read_words(&*image.file, offset, (geometry.cluster_size() / 8) as usize)?;
        let mut expected_next = 0;
        for (index, entry) in words.chunks_exact(geometry.entry_words()).enumerate() {
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
                self.add(host, geometry.cluster_size(), "a data cluster");
                if is_active {
                    let place = offset + (index * geometry.entry_words()) as u64 * 8;
                    self.flags.push(Flag { place, word, cluster: host >> geometry.cluster_bits });
                }
            }
        }
        Ok(())
    }

    /// Compares all refcounts with what was counted.
    fn compare(&mut self, refcounts: &mut Refcounts, repair: Repair) -> Result<()> {
        if self.refcounts_unusable {
            return Ok(());
        }
        for index in self.block_indexes(refcounts) {
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
        for chunk in self.counts.0.keys() {
            let blocks = chunk * CHUNK / entries..=(chunk * CHUNK + CHUNK - 1) / entries;
            indexes.extend(blocks.map(|block| block as usize));
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
        for cluster in first..end {
            let (is, should) = (refcounts.refcount(cluster)?, self.counts.of(cluster));
            if is.max(should) > 0 {
                self.report.image_end_offset = (cluster + 1) << geometry.cluster_bits;
            }
            if is == should {
                continue;
            }
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

    /// Finds COPIED bits that contradict the refcounts, as these are now.
    fn find_wrong_flags(&mut self, refcounts: &mut Refcounts) -> Result<()> {
        if self.refcounts_unusable {
            return Ok(());
        }
        let mut wrong = Vec::new();
        for flag in std::mem::take(&mut self.flags) {
            if (refcounts.refcount(flag.cluster)? == 1) != (flag.word & COPIED != 0) {
                self.say(format!("the entry at {} has a wrong COPIED bit", flag.place));
                wrong.push(flag);
            }
        }
        self.flags = wrong;
        Ok(())
    }

    fn repair_flags(&self) -> Result<()> {
        for flag in &self.flags {
            self.image.write_metadata(flag.place, &(flag.word ^ COPIED).to_be_bytes())?;
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
