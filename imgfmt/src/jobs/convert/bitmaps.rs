//! The dirty bitmaps of the source, for the copy.

use crate::bitmap::{BitmapChange, BitmapInfo};
use crate::image::Image;
use crate::jobs::error::JobError;

/// Copies dirty bitmaps of `source` into `destination`, with their granularity and enabled state.
/// Call it after copying the disk, so that the copy itself is not recorded as a change. All of them
/// are copied, or none.
///
/// # Errors
///
/// `Source` if the bits of one are unreliable; `Destination` with the errors of
/// [`Image::bitmap_transaction`].
pub fn copy_bitmaps(
    source: &Image,
    destination: &Image,
    bitmaps: &[BitmapInfo],
) -> Result<(), JobError> {
    let mut changes = Vec::new();
    for BitmapInfo { name, granularity, recording, .. } in bitmaps {
        let from = source.dirty_bits(name).map_err(JobError::source)?;
        let (name, granularity, recording) = (name.clone(), *granularity, *recording);
        changes.push(BitmapChange::Add { name: name.clone(), granularity, recording });
        changes.push(BitmapChange::MergeBits { into: name, from });
    }
    match changes.is_empty() {
        true => Ok(()),
        false => destination.bitmap_transaction(&changes).map_err(JobError::destination),
    }
}
