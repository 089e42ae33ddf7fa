//! Checking: every reference in the file is counted and compared with the refcounts.
//!
//! A refcount that is too high is a *leak*: space is lost, data is safe. One that is too low, a
//! wrong COPIED bit, or a reference to a place that cannot be is a *corruption*. Repair makes
//! refcounts and COPIED bits what they should be; references to impossible places it leaves alone.
//!
//! A repair never destroys what could be read before. First everything is counted; only then is it
//! decided what may be written:
//!
//! - A refcount block that anything else refers to, or that cannot be where the table says, makes
//!   the refcounts *unusable*: none of them is written. They are [rebuilt](rebuild) in clusters to
//!   which nothing refers.
//! - Where the references of some structure cannot be counted, no refcount is lowered and no COPIED
//!   bit is set.
//! - A word of a table is changed only if nothing else refers to the cluster that it lies in.

mod apply;
mod compare;
mod counts;
mod entries;
mod flags;
mod rebuild;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::{HashMap, HashSet};

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::clusters::CountReferences;
use crate::qcow2::image::Qcow2;
use crate::qcow2::on_disk::header::{autoclear, field, incompatible};
use counts::Counts;
use flags::Fix;

/// The permitted repairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Repair {
    /// None: the image is only read.
    #[default]
    None,
    /// Refcounts that are too high, if nothing else is wrong: otherwise nothing is written.
    Leaks,
    /// All possible ones.
    All,
}

/// The result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Clusters whose refcount is too high.
    pub leaks: u64,
    /// Defects that endanger data.
    pub corruptions: u64,
    /// Repaired leaks; not contained in `leaks`.
    pub leaks_repaired: u64,
    /// Repaired defects; not contained in `corruptions`.
    pub corruptions_repaired: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters of the disk whose data is in this image.
    pub allocated_clusters: u64,
    /// Of these, compressed clusters.
    pub compressed_clusters: u64,
    /// Of these, clusters that do not follow the previous one in the file.
    pub fragmented_clusters: u64,
    /// End of the used part of the file, in bytes.
    pub image_end_offset: u64,
    /// Descriptions of the findings; the first hundred of each check.
    pub messages: Vec<String>,
}

/// What is done about what a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Look,
    Leaks,
    All,
    /// When an image that was not closed properly is opened for writing: refcounts and COPIED bits,
    /// and nothing at all if anything else is wrong.
    Automatic,
}

const MESSAGES_MAX: usize = 100;
/// How many tables ahead of the one that is looked at reading begins.
const READ_AHEAD: usize = 16;
/// A repair may show what it could not see before; it does not go on for ever.
const ROUNDS_MAX: u32 = 8;

/// An L2 table, and how many L1 entries refer to it.
struct TableUse {
    offset: u64,
    weight: u64,
    is_active: bool,
}

/// An L1 entry of the present state that refers to an L2 table.
struct ActiveEntry {
    /// Where it lies in the file.
    place: u64,
    word: u64,
}

struct Checker<'a> {
    image: &'a Qcow2,
    /// References of everything, the refcounts' own structures included.
    counts: Counts,
    /// The clusters (first, last) of the refcount table and of its blocks.
    structure: Vec<(u64, u64)>,
    /// Clusters (first, last) behind the end of the file to which something refers.
    beyond: Vec<(u64, u64)>,
    file_length: u64,
    file_clusters: u64,
    report: CheckReport,
    tables: Vec<TableUse>,
    table_numbers: HashMap<u64, usize>,
    /// In the L1 table of the present state.
    active: Vec<ActiveEntry>,
    /// Words of tables that should be others.
    fixes: Vec<Fix>,
    /// Damages other than refcounts that are too low and words that can be put right.
    damages: u64,
    too_low: u64,
    /// Damages of the table of snapshots that writing it anew repairs.
    snapshot_damages: u64,
    /// Autoclear bits that the rest of the header contradicts.
    false_autoclear: u64,
    /// The header does not say clearly where the disk's data lies.
    is_contradictory: bool,
    /// The refcounts cannot be changed where they are.
    is_unusable: bool,
    /// Some cluster that is referred to has no refcount block.
    lacks_block: bool,
    /// Some structure's references cannot be counted.
    is_incomplete: bool,
}

impl Qcow2 {
    /// Checks and, if asked to, repairs. Nobody else may use the image meanwhile.
    pub(crate) fn check(&mut self, repair: Repair) -> Result<CheckReport> {
        if self.metadata.is_writable() && repair != Repair::None {
            // Whoever repairs after a crash, before bitmaps are recovered, must not be taken for a
            // foreign writer.
            drop(self.bitmaps.find_sidecar()?);
        }
        let mode = match (self.metadata.is_writable(), repair) {
            (false, _) | (_, Repair::None) => Mode::Look,
            (_, Repair::Leaks) => Mode::Leaks,
            (_, Repair::All) => Mode::All,
        };
        self.check_with_sidecar(mode)
    }

    /// The same for who has looked at the sidecar already, and holds it.
    pub(super) fn check_with_sidecar(&mut self, mode: Mode) -> Result<CheckReport> {
        if self.metadata.is_writable() {
            self.flusher().flush()?;
        }
        let mut checker = Checker::run(self)?;
        let found = checker.report.clone();
        let mut left = found.clone();
        for _ in 0..ROUNDS_MAX {
            let Some(step) = checker.next_step(mode) else { break };
            // A writer clears what it does not know, before anything else.
            self.clear_autoclear(!autoclear::KNOWN)?;
            self.take_step(step)?;
            checker = Checker::run(self)?;
            left = checker.report.clone();
        }
        let report = CheckReport {
            leaks_repaired: found.leaks.saturating_sub(left.leaks),
            corruptions_repaired: found.corruptions.saturating_sub(left.corruptions),
            messages: found.messages,
            ..left
        };
        if matches!(mode, Mode::All | Mode::Automatic) {
            self.clear_marks(&report)?;
        }
        Ok(report)
    }

    /// Removes the marks of an image that is damaged or was not closed, now that it is sound.
    fn clear_marks(&mut self, report: &CheckReport) -> Result<()> {
        let marks = incompatible::DIRTY | incompatible::CORRUPT;
        if report.corruptions > 0 || self.metadata.header().incompatible & marks == 0 {
            return Ok(());
        }
        self.clear_autoclear(!autoclear::KNOWN)?;
        let features = self.metadata.header().incompatible & !marks;
        self.metadata.write_header(field::INCOMPATIBLE, &features.to_be_bytes())?;
        self.metadata.sync_header()?;
        self.metadata.update_header(|header| header.incompatible = features);
        Ok(())
    }
}

impl Qcow2 {
    /// Makes refcounts as wide as that, 2 to this power bits. Afterwards the image must be closed.
    pub(crate) fn change_refcount_width(&mut self, order: u32) -> Result<()> {
        if order == self.geometry().refcount_order {
            return Ok(());
        }
        // What is about to be free must be free before it is counted.
        self.flusher().flush()?;
        self.clusters.release_all_freed();
        self.flusher().flush()?;
        let checker = Checker::run(self)?;
        if checker.report.corruptions > 0 || checker.is_incomplete || checker.is_unusable {
            let detail = "it is damaged; check and repair it first";
            return Err(Error::new(ErrorKind::Corrupt, "amend", detail));
        }
        let plan = checker.plan();
        self.rebuild_with_width(order, plan)
    }

    /// Whether nothing else refers to the refcount table and its blocks.
    pub(super) fn refcounts_overlap_nothing(&self) -> Result<bool> {
        let mut checker = Checker::new(self)?;
        checker.count_all()?;
        Ok(!checker.is_unusable)
    }

    /// How often the image on disk refers to each of these clusters, except from refcounts and
    /// bitmaps; nothing if some table's references are not known.
    pub(super) fn count_references_to(
        &self,
        clusters: &[u64],
    ) -> Result<Option<HashMap<u64, u64>>> {
        let mut checker = Checker::new(self)?;
        checker.count_disk()?;
        let count = |cluster: &u64| (*cluster, checker.counts.get(*cluster));
        Ok((!checker.is_incomplete).then(|| clusters.iter().map(count).collect()))
    }
}

impl CountReferences for Qcow2 {
    fn used_refcount_blocks(&self) -> Result<HashSet<u64>> {
        let mut checker = Checker::new(self)?;
        checker.count_all()?;
        if checker.is_incomplete {
            let detail = "a refcount block is missing, and not all tables can be read; copy the \
                          file, then run 'nbd-cli image check --repair all'";
            return Err(Error::new(ErrorKind::Corrupt, "change", detail));
        }
        let entries = self.geometry().block_entries();
        Ok(checker.counts.used().map(|cluster| cluster / entries).collect())
    }
}

impl<'a> Checker<'a> {
    fn new(image: &'a Qcow2) -> Result<Self> {
        let file_length =
            image.metadata.file.len().map_err(crate::qcow2::on_disk::words::read_error)?;
        Ok(Self {
            image,
            counts: Counts::default(),
            structure: Vec::new(),
            beyond: Vec::new(),
            file_length,
            file_clusters: image.geometry().clusters_of(file_length),
            report: CheckReport {
                total_clusters: image.geometry().clusters_of(image.metadata.header().size),
                ..CheckReport::default()
            },
            tables: Vec::new(),
            table_numbers: HashMap::new(),
            active: Vec::new(),
            fixes: Vec::new(),
            damages: 0,
            too_low: 0,
            snapshot_damages: 0,
            false_autoclear: 0,
            is_contradictory: false,
            is_unusable: false,
            lacks_block: false,
            is_incomplete: false,
        })
    }

    /// Looks at everything and changes nothing.
    fn run(image: &'a Qcow2) -> Result<Self> {
        let mut checker = Self::new(image)?;
        let table = checker.count_all()?;
        if !checker.is_unusable {
            checker.compare(table)?;
        }
        Ok(checker)
    }

    fn damage(&mut self, message: String) {
        self.damages += 1;
        self.report.corruptions += 1;
        self.say(message);
    }

    fn say(&mut self, message: String) {
        if self.report.messages.len() < MESSAGES_MAX {
            self.report.messages.push(message);
        }
    }
}

/// The error of opening an image for writing that could not be repaired.
pub(super) fn not_repaired(report: &CheckReport) -> Error {
    let detail = format!(
        "it was not closed properly, and {} damages in it need more than the repair at opening, \
         which changes refcounts only: copy the file, then run 'nbd-cli image check --repair all', \
         or open it read-only",
        report.corruptions
    );
    Error::new(ErrorKind::Corrupt, "repair", detail)
}
