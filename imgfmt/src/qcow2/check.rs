//! Checking: every reference in the file is counted and compared with the refcounts.
//!
//! A refcount that is too high is a *leak*: space is lost, data is safe. A refcount that is too
//! low, a wrong COPIED bit, or a reference to an invalid place is a *corruption*. Repair corrects
//! refcounts and COPIED bits, and leaves references to invalid places alone.
//!
//! A repair never destroys what could be read before. First everything is counted; only then is it
//! decided what may be written:
//!
//! - A refcount block with other references, or at an invalid place, makes the refcounts
//!   *unusable*: none of them is written. They are [rebuilt](rebuild) in clusters without
//!   references.
//! - Where the references of some structure cannot be counted, no refcount is lowered and no COPIED
//!   bit is set.
//! - A word of a table is changed only if there is no other reference to its cluster.

mod apply;
mod checker;
mod compare;
mod counts;
mod entries;
mod flags;
mod plan;
mod rebuild;
mod report;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::{HashMap, HashSet};

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::clusters::CountReferences;
use crate::qcow2::image::Qcow2;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::header::{autoclear, field, incompatible};
use checker::{Checker, Watched};
use rebuild::Rebuild;

pub(super) use report::Mode;
pub use report::{CheckReport, Repair};

/// The maximum number of rounds: a repair can reveal further damage.
const ROUNDS_MAX: u32 = 8;

impl Qcow2 {
    /// Checks and, if `repair` says so, repairs. No other process may use the image meanwhile.
    pub(crate) fn check(&mut self, repair: Repair) -> Result<CheckReport> {
        if self.metadata.is_writable() && repair != Repair::None {
            // A repair after a crash, before bitmaps are recovered, must not be taken for a foreign
            // writer.
            drop(self.bitmaps.find_sidecar()?);
        }
        let mode = match (self.metadata.is_writable(), repair) {
            (false, _) | (_, Repair::None) => Mode::Look,
            (_, Repair::Leaks) => Mode::Leaks,
            (_, Repair::All) => Mode::All,
        };
        self.check_with_sidecar(mode)
    }

    /// As [`check`](Self::check), for callers that hold the sidecar already.
    pub(super) fn check_with_sidecar(&mut self, mode: Mode) -> Result<CheckReport> {
        if self.metadata.is_writable() {
            self.flusher().flush()?;
        }
        let mut checker = Checker::run(self)?;
        let found = checker.report.clone();
        let mut left = found.clone();
        for _ in 0..ROUNDS_MAX {
            let Some(step) = checker.next_step(mode) else { break };
            // A writer first clears the autoclear bits that it does not know.
            self.metadata.clear_autoclear(!autoclear::KNOWN)?;
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
        self.metadata.clear_autoclear(!autoclear::KNOWN)?;
        let features = self.metadata.header().incompatible & !marks;
        self.metadata.write_header(field::INCOMPATIBLE, &features.to_be_bytes())?;
        self.metadata.sync_header()?;
        self.metadata.update_header(|header| header.incompatible = features);
        Ok(())
    }
}

impl Qcow2 {
    /// Changes the width of refcounts to 2^`order` bits. Afterwards the image must be closed.
    pub(crate) fn change_refcount_width(&mut self, order: u32) -> Result<()> {
        if order == self.geometry().refcount_order {
            return Ok(());
        }
        // Clusters that are about to be freed must be free before the count.
        self.flusher().flush()?;
        self.clusters.release_all_freed();
        self.flusher().flush()?;
        let checker = Checker::run(self)?;
        if checker.report.corruptions > 0 || checker.is_incomplete || checker.is_unusable {
            let detail = "it is damaged; check and repair it first";
            return Err(Error::new(ErrorKind::Corrupt, "amend", detail));
        }
        let plan = checker.plan();
        self.mapping.format.geometry.refcount_order = order;
        let parts = (&*self.metadata, &*self.clusters);
        let rebuild = Rebuild::new(parts, self.geometry(), plan);
        rebuild.refuse_too_narrow()?;
        rebuild.run()
    }

    /// Whether nothing else refers to the refcount table and its `blocks`.
    pub(super) fn refcounts_overlap_nothing(&self, blocks: &[HostCluster]) -> Result<bool> {
        let (header, geometry) = (self.metadata.header(), self.geometry());
        let table = geometry.host_cluster(header.refcount_table_offset);
        let table = table.run(u64::from(header.refcount_table_clusters));
        let mut checker = Checker::new(self)?;
        checker.watched = Some(Watched::new(table.chain(blocks.iter().copied())));
        checker.count_all()?;
        Ok(!checker.is_unusable)
    }

    /// The number of references of the image on disk to each of these clusters, except from
    /// refcounts and bitmaps; `None` if the references of some table are unknown.
    pub(super) fn count_references_to(
        &self,
        clusters: &[HostCluster],
    ) -> Result<Option<HashMap<HostCluster, u64>>> {
        let mut checker = Checker::new(self)?;
        checker.watched = Some(Watched::new(clusters.iter().copied()));
        checker.count_disk()?;
        let count = |cluster: &HostCluster| (*cluster, checker.counts.get(*cluster));
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
        Ok(checker.counts.used().map(|cluster| cluster.number() / entries).collect())
    }
}

impl<'a> Checker<'a> {
    /// Examines everything and changes nothing.
    fn run(image: &'a Qcow2) -> Result<Self> {
        let mut checker = Self::new(image)?;
        let table = checker.count_all()?;
        if !checker.is_unusable {
            checker.compare(table)?;
        }
        Ok(checker)
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
