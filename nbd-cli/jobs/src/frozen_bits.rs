//! Bitmaps that lack bits frozen by a checkpoint: messages and remedies. The rule itself is the
//! image engine's ([`imgfmt::BitmapChange::Freeze`]).

use std::fmt::Display;

use imgfmt::{BitmapChange, BitmapState, Image};

use crate::error::{JobError, JobErrorKind};
use crate::observer::Observer;
use crate::text::printable;

/// Reports which bitmaps got frozen bits back when an image was opened for writing, and whether
/// that failed.
pub fn report_thaw(image: &Image, observer: &dyn Observer) {
    let status = image.bitmap_durability();
    report_thawed(&status.thawed, observer);
    if let Some(failure) = status.thaw_failure {
        report_thaw_failure(&failure, observer);
    }
}

/// Reports that frozen bits are not back: the disk can be used anyway, but not the bitmaps that
/// lack them.
pub(crate) fn report_thaw_failure(failure: &dyn Display, observer: &dyn Observer) {
    observer.warning(&format!("bits frozen by a checkpoint are not merged back: {failure}"));
}

/// Reports which bitmaps got frozen bits back.
pub(crate) fn report_thawed(names: &[String], observer: &dyn Observer) {
    if !names.is_empty() {
        let names: Vec<_> = names.iter().map(|name| format!("'{}'", printable(name))).collect();
        observer.warning(&format!(
            "a checkpoint was interrupted; the bits that it had frozen are back in {}",
            names.join(", ")
        ));
    }
}

/// Checks that a bitmap has all of its bits, in the image or backing file that has it. A bitmap
/// that does not exist is complete.
///
/// # Errors
///
/// With the reason and the remedy if a checkpoint has frozen bits and they are not back.
pub(crate) fn check_complete(image: &Image, name: &str) -> Result<(), JobError> {
    let layer = image.bitmaps_beside(name);
    let state = layer.into_iter().find(|bitmap| bitmap.name == name).map(|bitmap| bitmap.state);
    let Some(BitmapState::Incomplete { frozen, problem }) = state else { return Ok(()) };
    let (name, frozen) = (printable(name), printable(&frozen));
    let lack = format!("the bitmap '{name}' lacks changes that a checkpoint has frozen");
    Err(JobError::new(
        JobErrorKind::Bitmap,
        match problem {
            Some(reason) => format!(
                "{lack}, and '{frozen}' cannot be relied on: {}; use 'nbd-cli bitmap repair IMAGE \
             {frozen}', which makes everything dirty in '{name}', and make a full backup",
                printable(&reason)
            ),
            None => format!(
                "{lack} in '{frozen}'; merge them back with 'nbd-cli bitmap recover IMAGE', on the image \
             or backing file that has it"
            ),
        },
    ))
}

/// Returns the error of a change of bitmaps, with the remedy if frozen bits are the reason.
pub(crate) fn explain_change(
    image: &Image,
    changes: &[BitmapChange],
    error: imgfmt::Error,
) -> JobError {
    let all = image.bitmaps();
    let concerns = |name: &str| match changes {
        [BitmapChange::Merge { from, .. }, ..] if name == from => true,
        [
            BitmapChange::Remove { name: changed }
            | BitmapChange::Clear { name: changed }
            | BitmapChange::Enable { name: changed },
        ] => *changed == imgfmt::frozen_bitmap_name(name),
        _ => false,
    };
    let about = all.iter().filter(|bitmap| concerns(&bitmap.name));
    let explained = about.filter_map(|bitmap| check_complete(image, &bitmap.name).err()).next();
    explained.unwrap_or_else(|| JobError::image(JobErrorKind::Bitmap, error))
}
