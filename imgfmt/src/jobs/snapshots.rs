//! Internal snapshots of images whose layers below are about to change.

use super::error::{JobError, JobErrorKind};
use crate::error::{Error, ErrorKind};
use crate::image::Image;

/// Refuses an image with internal snapshots: they show the layers below where they have no clusters
/// of their own, and a job prepares only the disk itself for other ones.
pub(super) fn refuse(overlay: &Image, action: &'static str) -> Result<(), JobError> {
    let info = overlay.info().map_err(JobError::destination)?.qcow2;
    if info.is_none_or(|info| info.snapshots.is_empty()) {
        return Ok(());
    }
    let detail = "it has internal snapshots, which show the layers below too; delete them first";
    let error = overlay.name(Error::new(ErrorKind::Unsupported, action, detail));
    Err(JobError::image(JobErrorKind::InvalidArgument, error))
}
