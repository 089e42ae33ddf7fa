//! Reports on the recovery of dirty bitmaps after a crash, and on their durability.

use std::path::Path;

use imgfmt::{BitmapState, Image, Recording, RecoveryPrecision};

use crate::error::{JobError, JobErrorKind};
use crate::observer::Observer;
use crate::text::printable;

/// Reports which bitmaps were recovered after a crash, and which were not.
pub(super) fn report_recovery(image: &Image, path: &Path, observer: &dyn Observer) {
    let path = printable(&path.to_string_lossy());
    let status = image.bitmap_durability();
    if !status.recovered.is_empty() {
        let names: Vec<String> =
            status.recovered.iter().map(|name| format!("'{}'", printable(name))).collect();
        let precision = match status.precision {
            RecoveryPrecision::Exact => "",
            RecoveryPrecision::WholeExtents => {
                "; the machine was restarted, so ranges that were being written are marked generously"
            }
        };
        observer.warning(&format!(
            "{path} was not closed; these bitmaps are recovered: {}{precision}",
            names.join(", ")
        ));
    }
    for bitmap in image.bitmaps() {
        if let (BitmapState::Inconsistent { reason }, Recording::Enabled) =
            (&bitmap.state, bitmap.recording)
        {
            observer.warning(&format!(
                "{path}: the bitmap '{}' cannot be used: {}",
                printable(&bitmap.name),
                printable(reason)
            ));
        }
    }
}

/// Warns if bitmaps will not survive the selected failures, because no file can be kept beside the
/// image.
pub(super) fn report_degraded(image: &Image, path: &Path, observer: &dyn Observer) {
    if let Some(degraded) = image.probe_bitmap_durability().degraded {
        observer.warning(&format!(
            "{}: its dirty bitmaps survive a clean shutdown only, not a crash: {}",
            printable(&path.to_string_lossy()),
            printable(&degraded)
        ));
    }
}

/// Refuses an image whose bitmaps will not survive the requested failures.
pub(super) fn refuse_degraded(image: &Image, path: &Path) -> Result<(), JobError> {
    let Some(degraded) = image.probe_bitmap_durability().degraded else { return Ok(()) };
    Err(JobError::new(
        JobErrorKind::Bitmap,
        format!(
            "'{}' is not served: its dirty bitmaps would not survive a crash, as --bitmap-durability \
         demands: {}; remove the cause, or use --bitmap-durability none",
            path.display(),
            degraded
        ),
    ))
}
