//! The durability of served dirty bitmaps, and reports on recovery after a crash.

use std::path::Path;

use clap::ValueEnum;
use imgfmt::{BitmapState, Image, Recording, RecoveryPrecision, Survives};

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

impl From<BitmapDurability> for Survives {
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
    let safety = image.bitmap_safety();
    if !safety.recovered.is_empty() {
        let names: Vec<String> =
            safety.recovered.iter().map(|name| format!("'{}'", printable(name))).collect();
        let precision = match safety.precision {
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
pub(crate) fn report_shortfall(image: &Image, path: &Path) {
    if let Some(shortfall) = image.probe_bitmap_safety().shortfall {
        warn(&format!(
            "{}: its dirty bitmaps survive a clean shutdown only, not a crash: {}",
            printable(&path.to_string_lossy()),
            printable(&shortfall)
        ));
    }
}

/// Refuses an image whose bitmaps will not survive the requested failures.
pub(crate) fn refuse_shortfall(image: &Image, path: &Path) -> Result<(), CommandError> {
    let Some(shortfall) = image.probe_bitmap_safety().shortfall else { return Ok(()) };
    Err(CommandError::new(format!(
        "'{}' is not served: its dirty bitmaps would not survive a crash, as --bitmap-durability \
         demands: {}; remove the cause, or use --bitmap-durability none",
        path.display(),
        shortfall
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_that_of_the_library() {
        assert_eq!(Survives::from(BitmapDurability::default()), Survives::default());
    }
}
