//! Writes after which backup each bitmap began, together with the changes on which that depends.

use super::directory::Entry;
use super::error::CHANGE;
use super::lineage::Lineage;
use super::plan::Planned;
use super::store::{Bitmaps, ImageServices};
use crate::backup::{BeganAfter, Uuid};
use crate::bitmap::{BitmapChange, ExclusiveState};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::metadata::header_edit::{change_autoclear, remove_extension, replace_extension};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::autoclear;

impl Bitmaps {
    /// The backup after which a bitmap of this layer began.
    pub(crate) fn began_after(&self, name: &str) -> BeganAfter {
        self.lineage.lock().began_after(name)
    }

    /// The identity of the disk, which it has since its first backup.
    pub(crate) fn disk_id(&self) -> Option<Uuid> {
        self.lineage.lock().disk
    }

    /// Forgets after which backups bitmaps began.
    pub(in crate::qcow2) fn forget_lineage(&self) -> Result<()> {
        let mut lineage = self.lineage.lock().clone();
        if lineage.records.is_empty() {
            return Ok(());
        }
        lineage.records.clear();
        lineage.is_doubtful = false;
        self.write_lineage(lineage)
    }

    /// Carries a plan out. The records of the bitmaps' backups are right even if it fails.
    pub(super) fn carry_out_changes(
        &self,
        image: &dyn ImageServices,
        exclusive: &mut ExclusiveState<'_, Entry>,
        plan: Vec<Planned>,
        changes: &[BitmapChange],
    ) -> Result<()> {
        let before = self.lineage.lock().clone();
        let mut after = before.clone();
        if after.is_doubtful {
            // The records written now are known to be right.
            after.records.clear();
            after.is_doubtful = false;
        }
        changes.iter().for_each(|change| after.change(change));
        let has_name = |name: &str| plan.iter().any(|planned| planned.bitmap.name == name);
        after.records.retain(|record| has_name(&record.name));
        let is_known = |lineage: &Lineage| !lineage.records.is_empty();
        // An image without records stays unchanged.
        let must_write = after.records != before.records && (is_known(&before) || is_known(&after));
        if must_write {
            self.write_lineage(after)?;
        }
        self.carry_out(image, exclusive, plan).inspect_err(|_| {
            // While it is unknown which list the disk names, records that fit both stay.
            let is_settled = !self.disk.lock().is_doubtful;
            if must_write && is_settled && !before.is_doubtful {
                // The old records still hold. If they cannot be written, the next backup is
                // refused.
                let _ = self.write_lineage(before);
            }
        })
    }

    fn write_lineage(&self, mut lineage: Lineage) -> Result<()> {
        let mut current = self.lineage.lock();
        lineage.sequence = current.sequence.wrapping_add(1);
        if lineage.disk.is_none() {
            let disk = Uuid::random();
            lineage.disk = Some(disk.map_err(|error| Error::from_io(CHANGE, error))?);
        }
        let since = self.metadata.failed_syncs();
        self.metadata.edit_header(|file, cluster| {
            let written = replace_extension(file, cluster, extension::LINEAGE, &lineage.encode())
                .and_then(|()| change_autoclear(file, autoclear::LINEAGE, 0));
            match written {
                // Without space there are no records of any bitmap.
                Err(error) if error.kind() == ErrorKind::Unsupported => {
                    lineage.records.clear();
                    change_autoclear(file, 0, autoclear::LINEAGE)?;
                    remove_extension(file, cluster, extension::LINEAGE)
                }
                written => written,
            }
        })?;
        self.metadata.refuse_lost_since(since)?;
        *current = lineage;
        Ok(())
    }
}
