//! Bits that a checkpoint has moved to another bitmap.
//!
//! At a checkpoint a bitmap NAME is *frozen*: in one step its bits move to `NAME.checkpoint`, which
//! is disabled and has the same granularity, and NAME restarts empty. When the marked changes are
//! backed up, the frozen bits are dropped; otherwise they are *thawed*, that is, merged back. Until
//! then NAME alone lacks changes. Therefore every writable open thaws before anything else, and
//! until then reading NAME is refused. In the image NAME is stored together with its frozen bits,
//! because other programs do not look for them.
//!
//! Such a bitmap is recognised only by its name and its granularity, and because it is disabled. A
//! bitmap that a user created in that form is therefore merged into NAME as well. That costs a
//! larger backup; the opposite mistake would lose data.

use std::collections::HashMap;

use super::directory::Entry;
use crate::bitmap::{Bitmap, Recording};

/// Suffix of the name of a bitmap that holds the frozen bits of another.
const SUFFIX: &str = ".checkpoint";

/// Returns the name of the bitmap to which [`BitmapChange::Freeze`](crate::BitmapChange::Freeze)
/// moves the bits of the bitmap `name`.
pub fn frozen_bitmap_name(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

/// Bitmaps by name.
pub(super) type ByName<'a> = HashMap<&'a str, &'a Bitmap<Entry>>;

/// The bitmaps by name; of several that have the same one, the first.
pub(super) fn by_name<'a>(bitmaps: impl Iterator<Item = &'a Bitmap<Entry>>) -> ByName<'a> {
    let mut found = HashMap::new();
    for bitmap in bitmaps {
        found.entry(bitmap.name.as_str()).or_insert(bitmap);
    }
    found
}

/// Whether `other` holds frozen bits of `bitmap`.
pub(super) fn is_frozen_part(other: &Bitmap<Entry>, bitmap: &Bitmap<Entry>) -> bool {
    other.name.strip_suffix(SUFFIX) == Some(&bitmap.name)
        && other.recording == Recording::Disabled
        && other.granularity_bits == bitmap.granularity_bits
}

pub(super) fn frozen_bits<'a>(
    all: &ByName<'a>,
    bitmap: &Bitmap<Entry>,
) -> Option<&'a Bitmap<Entry>> {
    let other = all.get(frozen_bitmap_name(&bitmap.name).as_str())?;
    is_frozen_part(other, bitmap).then_some(*other)
}

/// The bitmap whose frozen bits are in the bitmap of that name, if there is one.
pub(super) fn owner<'a>(all: &ByName<'a>, frozen: &str) -> Option<&'a Bitmap<Entry>> {
    let owner = all.get(frozen.strip_suffix(SUFFIX)?)?;
    frozen_bits(all, owner).map(|_| *owner)
}
