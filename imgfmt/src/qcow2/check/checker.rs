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

/// A word of a table that needs another value.
#[derive(Clone, Copy)]
pub(super) struct Fix {
    /// The offset of the word in the file.
    pub(super) place: HostOffset,
    pub(super) new: u64,
    /// Whether the fix sets the COPIED bit: afterwards the cluster that the entry names is written
    /// in place.
    pub(super) sets_copied: bool,
}

/// An L2 table, and the number of L1 entries that refer to it.
pub(super) struct TableUse {
    pub(super) offset: HostOffset,
    pub(super) weight: u64,
    pub(super) is_active: bool,
}

/// An L1 entry of the present state that refers to an L2 table.
pub(super) struct ActiveEntry {
    /// Its offset in the file.
    pub(super) place: HostOffset,
    pub(super) word: u64,
}

/// Clusters that are looked for. An image may have far more entries than there is time to count.
pub(super) struct Watched {
    sorted: Vec<HostCluster>,
    /// A bit for each remainder of their numbers, which most other clusters do not have.
    remainders: Vec<u64>,
}

impl Watched {
    /// In bits. A terabyte of disk has about 500 refcount blocks.
    const REMAINDERS: u64 = 1 << 20;

    pub(super) fn new(clusters: impl Iterator<Item = HostCluster>) -> Self {
        let mut sorted: Vec<_> = clusters.collect();
        sorted.sort_unstable();
        let mut remainders = vec![0; (Self::REMAINDERS / 64) as usize];
        for cluster in &sorted {
            let (word, bit) = Self::place(*cluster);
            remainders[word] |= bit;
        }
        Self { sorted, remainders }
    }

    fn place(cluster: HostCluster) -> (usize, u64) {
        let bit = cluster.number() % Self::REMAINDERS;
        ((bit / 64) as usize, 1 << (bit % 64))
    }

    /// Whether one of the clusters from `first` to `last` is among them.
    pub(super) fn touches(&self, first: HostCluster, last: HostCluster) -> bool {
        let may_be = |cluster| {
            let (word, bit) = Self::place(cluster);
            self.remainders[word] & bit != 0
        };
        if !may_be(first) && (first == last || first + 1 == last && !may_be(last)) {
            return false;
        }
        let next = self.sorted.partition_point(|cluster| *cluster < first);
        self.sorted.get(next).is_some_and(|cluster| *cluster <= last)
    }
}

pub(super) struct Checker<'a> {
    pub(super) image: &'a Qcow2,
    /// If there are any, entries of L2 tables that lead to other clusters are passed over.
    pub(super) watched: Option<Watched>,
    /// All references, those of the refcounts' own structures included.
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
    /// The entries of the L1 table of the present state.
    pub(super) active: Vec<ActiveEntry>,
    /// Words of tables that need another value.
    pub(super) fixes: Vec<Fix>,
    /// Damage other than low refcounts and words that can be corrected.
    pub(super) damages: u64,
    pub(super) too_low: u64,
    /// Damage to the snapshot table that writing the table again repairs.
    pub(super) snapshot_damages: u64,
    /// Autoclear bits that the rest of the header contradicts.
    pub(super) false_autoclear: u64,
    /// Whether the header contradicts itself about the location of the disk's data.
    pub(super) is_contradictory: bool,
    /// Whether the refcounts cannot be changed in place.
    pub(super) is_unusable: bool,
    /// Whether some cluster with references has no refcount block.
    pub(super) lacks_block: bool,
    /// Whether the references of some structure cannot be counted.
    pub(super) is_incomplete: bool,
}

impl<'a> Checker<'a> {
    pub(super) fn new(image: &'a Qcow2) -> Result<Self> {
        let file_length = image.metadata.file.len().map_err(read_error)?;
        Ok(Self {
            image,
            watched: None,
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

    /// Records a corruption that writing a word repairs.
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
