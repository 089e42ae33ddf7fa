//! Bits that a checkpoint set aside, when the end of its server cut it off.
//!
//! At a checkpoint the bitmap NAME begins anew, and its former bits wait in `NAME.checkpoint`,
//! disabled and of the same granularity, until the backup is complete. Until then NAME by itself
//! lacks changes: whoever believed it would lose them without a word. So whatever opens an image
//! for writing puts them back first ([`put_back`]), and whatever wants to know the bits of NAME
//! asks whether that was possible ([`check_complete`]).
//!
//! Only the name tells that a disabled bitmap of NAME's granularity is what a checkpoint left: one
//! that somebody made by hand is merged into NAME too. That costs a larger backup; the opposite
//! mistake would cost data.

use std::cmp::Reverse;

use imgfmt::{BitmapChange, BitmapInfo, BitmapState, Image, Recording};

use crate::error::CommandError;
use crate::output::{printable, warn};

/// What stands behind the name of a bitmap in the name of the one that holds its former bits.
const SUFFIX: &str = ".checkpoint";

/// The name of the bitmap in which the former bits of `bitmap` wait during a checkpoint.
pub(crate) fn set_aside_name(bitmap: &str) -> String {
    format!("{bitmap}{SUFFIX}")
}

/// The bits that a checkpoint of `bitmap` has set aside, if there are any.
pub(crate) fn set_aside<'a>(all: &'a [BitmapInfo], bitmap: &BitmapInfo) -> Option<&'a BitmapInfo> {
    let name = set_aside_name(&bitmap.name);
    all.iter().find(|other| {
        other.name == name
            && other.recording == Recording::Disabled
            && other.granularity == bitmap.granularity
    })
}

/// Puts back what checkpoints that were cut off have set aside, where the bits can be relied on;
/// says what it did, and why not. No checkpoint may be in progress.
///
/// # Errors
///
/// As [`Image::bitmap_transaction`]; nothing has changed then.
pub(crate) fn put_back(image: &Image) -> imgfmt::Result<()> {
    let bitmaps = image.bitmaps();
    let mut found: Vec<_> =
        bitmaps.iter().filter_map(|bitmap| Some((bitmap, set_aside(&bitmaps, bitmap)?))).collect();
    // What waits for bits of its own must have them before it is merged.
    found.sort_by_key(|(bitmap, _)| Reverse(bitmap.name.len()));
    let (mut changes, mut incomplete) = (Vec::new(), Vec::new());
    let mut merged = Vec::new();
    for (bitmap, aside) in found {
        let name = printable(&bitmap.name);
        if problem(bitmap).is_some()
            || problem(aside).is_some()
            || incomplete.contains(&&aside.name)
        {
            incomplete.push(&bitmap.name);
            warn(&why_incomplete(bitmap, aside));
            continue;
        }
        let (into, from) = (bitmap.name.clone(), aside.name.clone());
        changes.push(BitmapChange::Merge { into, from: from.clone() });
        changes.push(BitmapChange::Remove { name: from });
        merged.push(format!("'{name}'"));
    }
    if !changes.is_empty() {
        image.bitmap_transaction(&changes)?;
        warn(&format!(
            "a checkpoint was cut off; the bits it had set aside are back in {}",
            merged.join(", ")
        ));
    }
    Ok(())
}

/// Whether the bits of a bitmap are all there are, in the image or backing file that has it. A
/// bitmap that does not exist is complete.
///
/// # Errors
///
/// With the reason and the remedy if a checkpoint has set bits aside and they are not back.
pub(crate) fn check_complete(image: &Image, name: &str) -> Result<(), CommandError> {
    let layer = image.bitmaps_beside(name);
    let bitmap = layer.iter().find(|bitmap| bitmap.name == name);
    let Some((bitmap, aside)) = bitmap.and_then(|it| Some((it, set_aside(&layer, it)?))) else {
        return Ok(());
    };
    Err(CommandError::new(why_incomplete(bitmap, aside)))
}

/// Whether a change keeps the promise that a bitmap which seems sound has every change.
///
/// # Errors
///
/// With the reason and the remedy if it would make bits disappear that are still to be put back.
pub(crate) fn check_change(image: &Image, change: &BitmapChange) -> Result<(), CommandError> {
    match change {
        BitmapChange::Merge { from, .. } => check_complete(image, from),
        BitmapChange::Remove { name } => match name.strip_suffix(SUFFIX) {
            // If its bits could be relied on they would have been put back, unless those of the
            // other cannot, and then nobody believes it anyway.
            Some(bitmap) if is_unsound(image, name) => check_complete(image, bitmap),
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}

fn is_unsound(image: &Image, name: &str) -> bool {
    image.bitmaps().iter().any(|bitmap| bitmap.name == name && problem(bitmap).is_some())
}

/// Why the bits of a bitmap cannot be relied on.
fn problem(bitmap: &BitmapInfo) -> Option<&str> {
    match &bitmap.state {
        BitmapState::Consistent { .. } => None,
        BitmapState::Inconsistent { reason } | BitmapState::Damaged { reason } => Some(reason),
        _ => Some("nobody knows its state"),
    }
}

/// That a bitmap lacks what is set aside, and what to do.
fn why_incomplete(bitmap: &BitmapInfo, aside: &BitmapInfo) -> String {
    let (name, aside_name) = (printable(&bitmap.name), printable(&aside.name));
    let lack = format!("the bitmap '{name}' lacks changes that a checkpoint has set aside");
    match (problem(bitmap), problem(aside)) {
        (Some(reason), _) => format!(
            "{lack} in '{aside_name}', and cannot be relied on: {}; repair it with \
             'nbd-cli bitmap repair IMAGE {name}', which makes everything dirty, and make a full \
             backup",
            printable(reason)
        ),
        (None, Some(reason)) => format!(
            "{lack}, and '{aside_name}' cannot be relied on: {}; use 'nbd-cli bitmap repair IMAGE \
             {aside_name}', which makes everything dirty in '{name}', and make a full backup",
            printable(reason)
        ),
        (None, None) => format!(
            "{lack} in '{aside_name}'; put them back with 'nbd-cli bitmap recover IMAGE', on the \
             image or backing file that has it"
        ),
    }
}
