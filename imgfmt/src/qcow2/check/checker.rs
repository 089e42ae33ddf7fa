//! The state of a check.

use std::collections::HashMap;

use super::counts::Counts;
use super::report::CheckReport;
use crate::error::Result;
use crate::qcow2::image::Qcow2;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::words::read_error;
use crate::units::HostOffset;

const MESSAGES_MAX: usize = 100;
/// Number of tables for which reading ahead is started.
pub(super) const READ_AHEAD: usize = 16;

/// A word of a table that should be another.
#[derive(Clone, Copy)]
pub(super) struct Fix {
    /// Where the word lies in the file.
    pub(super) place: HostOffset,
    pub(super) new: u64,
    /// Afterwards the cluster that the entry names is written in place.
    pub(super) sets_copied: bool,
}

/// An L2 table, and how many L1 entries refer to it.
pub(super) struct TableUse {
    pub(super) offset: HostOffset,
    pub(super) weight: u64,
    pub(super) is_active: bool,
}

/// An L1 entry of the present state that refers to an L2 table.
pub(super) struct ActiveEntry {
    /// Where it lies in the file.
    pub(super) place: HostOffset,
    pub(super) word: u64,
}

pub(super) struct Checker<'a> {
    pub(super) image: &'a Qcow2,
    /// References of everything, the refcounts' own structures included.
    pub(super) counts: Counts,
    /// The clusters (first, last) of the refcount table and of its blocks.
    pub(super) structure: Vec<(HostCluster, HostCluster)>,
    /// Clusters (first, last) past the end of the file to which an entry refers.
    pub(super) beyond: Vec<(HostCluster, HostCluster)>,
    pub(super) file_length: u64,
    /// The first cluster after the end of the file.
    pub(super) file_end: HostCluster,
    pub(super) report: CheckReport,
    pub(super) tables: Vec<TableUse>,
    pub(super) table_numbers: HashMap<HostOffset, usize>,
    /// In the L1 table of the present state.
    pub(super) active: Vec<ActiveEntry>,
    /// Words of tables that need another value.
    pub(super) fixes: Vec<Fix>,
    /// Damages other than refcounts that are too low and words that can be put right.
    pub(super) damages: u64,
    pub(super) too_low: u64,
    /// Damages of the snapshot table that are repaired by writing the table again.
    pub(super) snapshot_damages: u64,
    /// Autoclear bits that the rest of the header contradicts.
    pub(super) false_autoclear: u64,
    /// The header does not say clearly where the disk's data lies.
    pub(super) is_contradictory: bool,
    /// The refcounts cannot be changed where they are.
    pub(super) is_unusable: bool,
    /// Some cluster that is referred to has no refcount block.
    pub(super) lacks_block: bool,
    /// Some structure's references cannot be counted.
    pub(super) is_incomplete: bool,
}

impl<'a> Checker<'a> {
    pub(super) fn new(image: &'a Qcow2) -> Result<Self> {
        let file_length = image.metadata.file.len().map_err(read_error)?;
        Ok(Self {
            image,
            counts: Counts::default(),
            structure: Vec::new(),
            beyond: Vec::new(),
            file_length,
            file_end: HostCluster::new(image.geometry().clusters_of(file_length)),
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

    /// Notes a corruption that another word in its place repairs.
    pub(super) fn fix(&mut self, fix: Fix, message: String) {
        self.report.corruptions += 1;
        self.say(message);
        self.fixes.push(fix);
    }

    pub(super) fn damage(&mut self, message: String) {
        self.damages += 1;
        self.report.corruptions += 1;
        self.say(message);
    }

    pub(super) fn say(&mut self, message: String) {
        if self.report.messages.len() < MESSAGES_MAX {
            self.report.messages.push(message);
        }
    }
}
