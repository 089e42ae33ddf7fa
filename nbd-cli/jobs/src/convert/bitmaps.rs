//! The dirty bitmaps of the source, for the new image.

use imgfmt::{BitmapInfo, Image};

use super::options::CopiedBitmaps;
use crate::error::{JobError, JobErrorKind};
use crate::frozen_bits::check_complete;
use crate::image_location::ImageLocation;
use crate::observer::Observer;
use crate::text::printable;

/// Returns the bitmaps of the source itself, not of its backing files. An
/// unreliable one is left out with a warning, or an error.
///
/// # Errors
///
/// If the source cannot have bitmaps, or has an unreliable one.
pub(super) fn of_source(
    source: &Image,
    from: &ImageLocation,
    copied: CopiedBitmaps,
    observer: &dyn Observer,
) -> Result<Vec<BitmapInfo>, JobError> {
    if copied == CopiedBitmaps::None {
        return Ok(Vec::new());
    }
    if source.format() != imgfmt::Format::Qcow2 {
        return Err(JobError::invalid(format!(
            "--bitmaps needs a qcow2 image as the source, and {from} is a {} image; leave it out",
            source.format().description()
        )));
    }
    let broken = |what: String| match copied {
        CopiedBitmaps::Reliable => {
            observer.warning(&format!("{what}: left out"));
            Ok(())
        }
        _ => Err(JobError::new(
            JobErrorKind::Bitmap,
            format!(
                "{what}; repair the bitmap or remove it, or add --skip-broken-bitmaps to leave it out"
            ),
        )),
    };
    if let Some(damage) = source.bitmap_damage() {
        broken(format!("the bitmaps of {from} cannot be found: {damage}"))?;
    }
    let mut found = Vec::new();
    for bitmap in source.bitmaps() {
        let name = printable(&bitmap.name);
        match bitmap.state.problem() {
            None => found.push(bitmap),
            Some(why) => {
                if copied != CopiedBitmaps::Reliable {
                    // Bits that a checkpoint has moved come back without loss.
                    check_complete(source, &bitmap.name).map_err(|error| {
                        let message =
                            format!("{error}, or add --skip-broken-bitmaps to leave it out");
                        JobError::new(error.kind(), message)
                    })?;
                }
                broken(format!("the bitmap '{name}' of {from} cannot be relied on: {why}"))?;
            }
        }
    }
    Ok(found)
}

/// Refuses bitmaps that an existing image cannot store.
///
/// # Errors
///
/// If its disk has another size, or if it has a bitmap of the same name.
pub(super) fn check_existing(
    bitmaps: &[BitmapInfo],
    source: &Image,
    image: &Image,
    to: &ImageLocation,
) -> Result<(), JobError> {
    if bitmaps.is_empty() {
        return Ok(());
    }
    if image.size() != source.size() {
        return Err(JobError::invalid(format!(
            "the disk in {to} has {} bytes and the source {}: bitmaps can be copied only between \
             disks of one size",
            image.size(),
            source.size()
        )));
    }
    let there = image.bitmaps();
    match bitmaps.iter().find(|bitmap| there.iter().any(|other| other.name == bitmap.name)) {
        None => Ok(()),
        Some(bitmap) => Err(JobError::invalid(format!(
            "{to} has a bitmap '{}' already; remove it first",
            printable(&bitmap.name)
        ))),
    }
}
