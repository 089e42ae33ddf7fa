//! The correct refcounts, after everything was counted.

use super::counts::Counts;
use crate::error::Result;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::refcount::Refcounts;

/// The correct refcounts.
pub(super) struct Plan {
    pub(super) counts: Counts,
    pub(super) structure: Vec<(HostCluster, HostCluster)>,
    pub(super) beyond: Vec<(HostCluster, HostCluster)>,
    pub(super) file_length: u64,
    /// The first cluster after the end of the file.
    pub(super) file_end: HostCluster,
    /// Whether not everything could be counted: then no refcount is lowered.
    pub(super) is_incomplete: bool,
}

impl Plan {
    /// The length that the file needs, in bytes, if it is too short: the last cluster of a
    /// structure may be cut off by the end of the file.
    pub(super) fn longer_file(&self, geometry: Geometry) -> Option<u64> {
        let last = self.counts.last().filter(|last| *last >= self.file_end);
        last.map(|last| geometry.host_offset(last + 1).bytes())
    }

    /// Corrects refcounts in memory.
    pub(super) fn correct(&self, refcounts: &mut Refcounts) -> Result<()> {
        let geometry = refcounts.geometry;
        // Nothing else refers to them.
        refcounts.trust_all();
        let entries = geometry.block_entries();
        for index in 0..refcounts.table.len() {
            if !refcounts.has_block(index) {
                continue;
            }
            let first = refcounts.first_of_block(index);
            let end = (first + entries).min(self.file_end + 1);
            let mut wrong = Vec::new();
            let block = refcounts.block_view(index)?;
            self.counts.for_each(first, end, |cluster, should| {
                let is = block.refcount((cluster - first) as usize);
                let should = should.min(geometry.refcount_max());
                let is_in_file = cluster < self.file_end || should > 0;
                let may = is < should || !self.is_incomplete;
                if is != should && is_in_file && may {
                    wrong.push((cluster, should));
                }
            });
            for (cluster, should) in wrong {
                refcounts.set_refcount(cluster, should)?;
            }
        }
        Ok(())
    }
}
