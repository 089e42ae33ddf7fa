//! Walks along disks, extent by extent.

use imgfmt::{Extent, GuestOffset, GuestRange, Image};

use crate::error::CommandError;

/// The range from `start` to `end`; empty if `end` lies before.
pub(super) fn span(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end)).unwrap_or_default()
}

/// All extents of a disk in order.
#[derive(Debug)]
pub(super) struct Extents<'a>(imgfmt::Extents<&'a Image>);

impl<'a> Extents<'a> {
    pub(super) fn new(image: &'a Image) -> Self {
        Self(image.extents(span(0, image.size())))
    }

    /// The next extent, or `None` at the end of the disk.
    pub(super) fn next(&mut self) -> Result<Option<Extent>, CommandError> {
        Ok(self.0.next().transpose()?)
    }
}

/// Reads a range of a disk; what lies behind its end is zero.
pub(super) fn read_padded(
    image: &Image,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), CommandError> {
    let inside = image.size().saturating_sub(offset).min(buffer.len() as u64) as usize;
    let (present, behind) = buffer.split_at_mut(inside);
    behind.fill(0);
    if !present.is_empty() {
        image.read_at(GuestOffset::new(offset), present)?;
    }
    Ok(())
}
