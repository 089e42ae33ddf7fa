//! Repairing: one step at a time, after each of which everything is looked at again.

use super::counts::Counts;
use super::flags::Fix;
use super::{Checker, Mode};
use crate::error::Result;
use crate::qcow2::image::Qcow2;
use crate::qcow2::metadata::header_edit::change_autoclear;
use crate::qcow2::on_disk::header::field;
use crate::qcow2::on_disk::snapshot;

/// What is to be done next.
pub(super) enum Step {
    /// Make new refcounts elsewhere.
    Rebuild(Plan),
    /// Change refcounts where they are.
    SetRefcounts(Plan),
    /// Change words of tables.
    Fix(Vec<Fix>),
    /// Write the table of snapshots anew.
    RewriteSnapshots,
    /// Clear autoclear bits that mean nothing.
    ClearAutoclear(u64),
    /// Remove bitmaps whose places cannot be told.
    DropBitmaps,
}

/// What refcounts should be.
pub(super) struct Plan {
    pub(super) counts: Counts,
    pub(super) structure: Vec<(u64, u64)>,
    pub(super) beyond: Vec<(u64, u64)>,
    pub(super) file_length: u64,
    pub(super) file_clusters: u64,
    /// Whatever could not be counted may be anywhere: nothing is given away.
    pub(super) is_incomplete: bool,
}

impl Checker<'_> {
    /// What may be done next, if anything.
    pub(super) fn next_step(self, mode: Mode) -> Option<Step> {
        let is_trusted = !self.is_unusable && !self.is_incomplete && self.damages == 0;
        match mode {
            Mode::Look => return None,
            _ if self.is_contradictory => return None,
            Mode::Leaks if !is_trusted || self.too_low > 0 || self.false_autoclear != 0 => {
                return None;
            }
            Mode::Automatic if !is_trusted => return None,
            _ => {}
        }
        if self.is_unusable || self.lacks_block {
            return Some(Step::Rebuild(self.plan()));
        }
        if self.too_low > 0 || (self.report.leaks > 0 && !self.is_incomplete) {
            return Some(Step::SetRefcounts(self.plan()));
        }
        let fixes: Vec<Fix> = self.fixes.iter().copied().filter(|fix| self.is_safe(*fix)).collect();
        if !fixes.is_empty() {
            return Some(Step::Fix(fixes));
        }
        if self.snapshot_damages > 0 {
            return Some(Step::RewriteSnapshots);
        }
        if self.false_autoclear != 0 {
            return Some(Step::ClearAutoclear(self.false_autoclear));
        }
        let has_bad_bitmaps = self.is_incomplete && !self.image.bitmaps.places().1.is_empty();
        has_bad_bitmaps.then_some(Step::DropBitmaps)
    }

    /// Whether a word may be changed: nothing but tables lies there, and what would be written in
    /// place afterwards has no reference that was not counted.
    fn is_safe(&self, fix: Fix) -> bool {
        let bits = self.image.geometry().cluster_bits;
        let cluster = fix.place >> bits;
        let table = self.table_numbers.get(&(cluster << bits));
        let expected = table.map_or(1, |number| self.tables[*number].weight);
        self.counts.get(cluster) == expected && !(fix.sets_copied && self.is_incomplete)
    }

    pub(super) fn plan(self) -> Plan {
        Plan {
            counts: self.counts,
            structure: self.structure,
            beyond: self.beyond,
            file_length: self.file_length,
            file_clusters: self.file_clusters,
            is_incomplete: self.is_incomplete,
        }
    }
}

impl Qcow2 {
    /// Does what is to be done next. Afterwards it is on disk.
    pub(super) fn take_step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Rebuild(plan) => self.rebuild_refcounts(plan),
            Step::SetRefcounts(plan) => self.set_refcounts(&plan),
            Step::Fix(fixes) => {
                for fix in fixes {
                    self.metadata.update_header(|header| {
                        header.overlong_end.take_if(|place| *place == fix.place);
                    });
                    self.metadata.write(fix.place, &fix.new.to_be_bytes())?;
                }
                self.metadata.sync()
            }
            Step::RewriteSnapshots => self.rewrite_snapshots(),
            Step::ClearAutoclear(bits) => self.clear_autoclear(bits),
            Step::DropBitmaps => {
                self.bitmaps.drop_damaged(self)?;
                // What that frees must be free before it is counted again, or it would be freed twice.
                self.flusher().flush()?;
                self.clusters.release_all_freed();
                self.flusher().flush()
            }
        }
    }

    /// Clears autoclear bits that say what nobody keeps true.
    pub(super) fn clear_autoclear(&mut self, bits: u64) -> Result<()> {
        if self.metadata.header().autoclear & bits != 0 {
            self.metadata.edit_header(|file, _| change_autoclear(file, 0, bits))?;
        }
        self.metadata.update_header(|header| header.autoclear &= !bits);
        Ok(())
    }

    /// Writes the table of snapshots anew, with what could be understood of it. The clusters of the
    /// old one leak then.
    fn rewrite_snapshots(&mut self) -> Result<()> {
        let found = snapshot::read_damaged_table(&*self.metadata.file, &self.metadata.header())?;
        let bytes = snapshot::encode_table(&found.snapshots);
        let offset = if bytes.is_empty() { 0 } else { self.write_new(&bytes)? };
        self.flusher().flush()?;
        let count = found.snapshots.len() as u32;
        let mut fields = [0; 12];
        fields[..4].copy_from_slice(&count.to_be_bytes());
        fields[4..].copy_from_slice(&offset.to_be_bytes());
        self.metadata.write_header(field::SNAPSHOT_COUNT, &fields)?;
        self.metadata.update_header(|header| {
            header.snapshots_offset = offset;
            header.snapshot_count = count;
        });
        self.metadata.sync_header()
    }

    fn set_refcounts(&self, plan: &Plan) -> Result<()> {
        let geometry = self.geometry();
        // A structure may be cut short by the end of the file, but not be shorter than that.
        if let Some(last) = plan.counts.last().filter(|last| *last >= plan.file_clusters) {
            let length = (last + 1) << geometry.cluster_bits;
            self.metadata.file.set_len(length).map_err(|error| self.grow_error(error))?;
        }
        let mut allocator = self.clusters.allocator()?;
        let refcounts = &mut allocator.refcounts;
        // Nothing else refers to them.
        refcounts.trust_all();
        let entries = geometry.block_entries();
        for index in 0..refcounts.table.len() {
            if !refcounts.has_block(index) {
                continue;
            }
            let first = index as u64 * entries;
            let end = (first + entries).min(plan.file_clusters + 1);
            let mut wrong = Vec::new();
            let block = refcounts.block_view(index)?;
            plan.counts.for_each(first, end, |cluster, should| {
                let is = block.refcount((cluster - first) as usize);
                let should = should.min(geometry.refcount_max());
                let is_in_file = cluster < plan.file_clusters || should > 0;
                let may = is < should || !plan.is_incomplete;
                if is != should && is_in_file && may {
                    wrong.push((cluster, should));
                }
            });
            for (cluster, should) in wrong {
                refcounts.set_refcount(cluster, should)?;
            }
        }
        drop(allocator);
        self.commits.changes.note();
        self.flusher().flush()
    }
}
