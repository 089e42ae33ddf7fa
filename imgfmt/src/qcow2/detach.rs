//! Takes layers below an open image away, when the image has everything that they provide.

use std::ffi::OsStr;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::layer::Layer;
use crate::qcow2::image::Qcow2;
use crate::qcow2::metadata::backing_change::{Use, change_backing};
use crate::wanted::Wanted;

impl Qcow2 {
    /// How often layers below were taken away since the image was opened.
    pub(crate) fn backing_changes(&self) -> u64 {
        self.backing.changes()
    }

    /// Where readers have found the layer below.
    pub(crate) fn wanted(&self) -> &Wanted {
        &self.backing.wanted
    }

    /// Makes the first of the layers `left` the backing file, which the header calls `name`, or
    /// none. The image must have everything that the layers above it provided, and keep it: as long
    /// as the header in memory names a backing file, no change of the disk uncovers one.
    pub(crate) fn detach_backing(
        &self,
        left: &Arc<[Arc<dyn Layer>]>,
        name: Option<(&OsStr, Format)>,
    ) -> Result<()> {
        self.metadata.refuse_if_corrupt()?;
        if !self.metadata.snapshots()?.is_empty() {
            let detail = "it has internal snapshots, which show the layers below too";
            return Err(Error::new(ErrorKind::Unsupported, "detach the backing file of", detail));
        }
        self.metadata.break_seal()?;
        self.flusher().flush()?;
        // The kernel may have dropped what a failed sync did not write, and the copy is below.
        if self.metadata.failed_syncs() > 0 {
            let detail = "a flush has failed since it was opened, so what was copied may be lost; \
                          keep the layers below it, and copy the disk to another place";
            return Err(Error::new(ErrorKind::Io, "detach the backing file of", detail));
        }
        self.metadata.edit_first_sector(|file| change_backing(file, name, Use::Open))?;
        self.backing.replace(left);
        // Only now: from here on, discarded clusters may have no entry.
        self.metadata.update_header(|header| {
            header.backing_name = name.map(|(name, _)| name.to_owned());
            header.extensions.backing_format = name.map(|(_, format)| format.name().to_owned());
        });
        Ok(())
    }

    /// Sets another backing file for the time after the image is closed, which it has been by
    /// [`close`](crate::layer::WritableLayer::close); its file is still open, and locked.
    pub(crate) fn rename_backing(&self, name: Option<(&OsStr, Format)>) -> Result<()> {
        self.metadata.edit_first_sector(|file| change_backing(file, name, Use::Closed))
    }
}
