//! Ranges of disks.

use crate::error::Result;
use crate::image::Image;
use crate::units::{GuestOffset, GuestRange};

/// The range from `start` to `end`; empty if `end` is before `start`.
pub(super) fn span(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end)).unwrap_or_default()
}

/// All of a disk.
pub(super) fn whole(image: &Image) -> GuestRange {
    span(0, image.size())
}

/// Reads a range of a disk, which reads as zero beyond its end.
pub(super) fn read_padded(image: &Image, offset: u64, buffer: &mut [u8]) -> Result<()> {
    let inside = image.size().saturating_sub(offset).min(buffer.len() as u64) as usize;
    let (present, beyond) = buffer.split_at_mut(inside);
    beyond.fill(0);
    if !present.is_empty() {
        image.read_at(GuestOffset::new(offset), present)?;
    }
    Ok(())
}
