//! Repairing: one step at a time, with a new check after each.

use super::checker::{Checker, Fix};
use super::plan::Plan;
use super::rebuild::Rebuild;
use super::report::Mode;
use crate::error::{Error, Result};
use crate::qcow2::image::Qcow2;
use crate::qcow2::on_disk::header::field;
use crate::qcow2::on_disk::snapshot;
use crate::units::HostOffset;

/// The next step of a repair.
pub(super) enum Step {
    /// Create new refcounts in other clusters.
    Rebuild(Plan),
    /// Change refcounts where they are.
    SetRefcounts(Plan),
    /// Change words of tables.
    Fix(Vec<Fix>),
    /// Write a new table of snapshots.
    RewriteSnapshots,
    /// Clear meaningless autoclear bits.
    ClearAutoclear(u64),
    /// Remove bitmaps whose clusters are unknown.
    DropBitmaps,
}

impl Checker<'_> {
    /// The next permitted step, if there is one.
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

    /// Whether a word may be changed: its cluster contains only tables, and clusters that would be
    /// written in place afterwards have no uncounted references.
    fn is_safe(&self, fix: Fix) -> bool {
        let geometry = self.image.geometry();
        let cluster = geometry.host_cluster(fix.place);
        let table = self.table_numbers.get(&geometry.host_offset(cluster));
        let expected = table.map_or(1, |number| self.tables[*number].weight);
        self.counts.get(cluster) == expected && !(fix.sets_copied && self.is_incomplete)
    }

    pub(super) fn plan(self) -> Plan {
        Plan {
            counts: self.counts,
            structure: self.structure,
            beyond: self.beyond,
            file_length: self.file_length,
            file_end: self.file_end,
            is_incomplete: self.is_incomplete,
        }
    }
}

impl Qcow2 {
    /// Carries out a step durably.
    pub(super) fn take_step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Rebuild(plan) => {
                let parts = (&*self.metadata, &*self.clusters);
                Rebuild::new(parts, self.geometry(), plan).run()
            }
            Step::SetRefcounts(plan) => {
                if let Some(length) = plan.longer_file(self.geometry()) {
                    let grown = self.metadata.file.set_len(length);
                    grown.map_err(|error| self.metadata.named(Error::from_io("grow", error)))?;
                }
                plan.correct(&mut self.clusters.allocator()?.refcounts)?;
                self.commits.changes.note();
                self.flusher().flush()
            }
            Step::Fix(fixes) => {
                for fix in fixes {
                    self.metadata.update_header(|header| {
                        header.overlong_end.take_if(|place| *place == fix.place.bytes());
                    });
                    self.metadata.write(fix.place, &fix.new.to_be_bytes())?;
                }
                self.metadata.sync()
            }
            Step::RewriteSnapshots => self.rewrite_snapshots(),
            Step::ClearAutoclear(bits) => self.metadata.clear_autoclear(bits),
            Step::DropBitmaps => {
                self.bitmaps.drop_damaged(self)?;
                // These clusters must be free before the next count, or they would be freed twice.
                self.flusher().flush()?;
                self.clusters.release_all_freed();
                self.flusher().flush()
            }
        }
    }

    /// Writes a new table of the snapshots that could be read. The clusters of the old one leak.
    fn rewrite_snapshots(&mut self) -> Result<()> {
        let found = snapshot::read_damaged_table(&*self.metadata.file, &self.metadata.header())?;
        let bytes = snapshot::encode_table(&found.snapshots);
        let offset = match bytes.is_empty() {
            true => HostOffset::new(0),
            false => self.clusters.write_new(&bytes, self)?,
        };
        self.flusher().flush()?;
        let count = found.snapshots.len() as u32;
        let mut fields = [0; 12];
        fields[..4].copy_from_slice(&count.to_be_bytes());
        fields[4..].copy_from_slice(&offset.bytes().to_be_bytes());
        self.metadata.write_header(field::SNAPSHOT_COUNT, &fields)?;
        self.metadata.update_header(|header| {
            header.snapshots_offset = offset;
            header.snapshot_count = count;
        });
        self.metadata.sync_header()
    }
}
