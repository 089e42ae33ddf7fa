//! The durability of served dirty bitmaps, and reports on recovery after a crash.

use std::path::Path;

use clap::ValueEnum;
use imgfmt::{BitmapState, Image, Recording, RecoveryPrecision};

use crate::error::CommandError;
use crate::output::printable;
use crate::output::warn;

/// The failures that recording dirty bitmaps survive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BitmapDurability {
    /// Power failure, and everything below.
    #[default]
    Power,
    /// A crash of the server.
    Process,
    /// Only a clean shutdown, as with QEMU.
    None,
}

impl From<BitmapDurability> for imgfmt::BitmapDurability {
    fn from(durability: BitmapDurability) -> Self {
        match durability {
            BitmapDurability::Power => Self::PowerLoss,
            BitmapDurability::Process => Self::ProcessDeath,
            BitmapDurability::None => Self::CleanClose,
        }
    }
}

/// Reports which bitmaps were recovered after a crash, and which were not.
pub(crate) fn report_recovery(image: &Image, path: &Path) {
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
        warn(&format!(
            "{path} was not closed; these bitmaps are recovered: {}{precision}",
            names.join(", ")
        ));
    }
    for bitmap in image.bitmaps() {
        if let (BitmapState::Inconsistent { reason }, Recording::Enabled) =
            (&bitmap.state, bitmap.recording)
        {
            warn(&format!(
                "{path}: the bitmap '{}' cannot be used: {}",
                printable(&bitmap.name),
                printable(reason)
            ));
        }
    }
}

/// Warns if bitmaps will not survive the selected failures, because no file can be kept beside the
/// image.
pub(crate) fn report_degraded(image: &Image, path: &Path) {
    if let Some(degraded) = image.probe_bitmap_durability().degraded {
        warn(&format!(
            "{}: its dirty bitmaps survive a clean shutdown only, not a crash: {}",
            printable(&path.to_string_lossy()),
            printable(&degraded)
        ));
    }
}

/// Refuses an image whose bitmaps will not survive the requested failures.
pub(crate) fn refuse_degraded(image: &Image, path: &Path) -> Result<(), CommandError> {
    let Some(degraded) = image.probe_bitmap_durability().degraded else { return Ok(()) };
    Err(CommandError::new(format!(
        "'{}' is not served: its dirty bitmaps would not survive a crash, as --bitmap-durability \
         demands: {}; remove the cause, or use --bitmap-durability none",
        path.display(),
        degraded
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_that_of_the_library() {
        assert_eq!(
            imgfmt::BitmapDurability::from(BitmapDurability::default()),
            imgfmt::BitmapDurability::default()
        );
    }
}
