//! Walks along disks, extent by extent.

use std::collections::VecDeque;

use imgfmt::{Extent, GuestOffset, GuestRange, Image};

use crate::error::CommandError;

/// How many extents are fetched at a time: bounds the memory, however fragmented the disk is.
const BATCH: usize = 1024;

/// The range from `start` to `end`; empty if `end` lies before.
pub(super) fn span(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end)).unwrap_or_default()
}

/// All extents of a disk in order.
#[derive(Debug)]
pub(super) struct Extents<'a> {
    image: &'a Image,
    position: u64,
    fetched: VecDeque<Extent>,
}

impl<'a> Extents<'a> {
    pub(super) fn new(image: &'a Image) -> Self {
        Self { image, position: 0, fetched: VecDeque::new() }
    }

    /// The next extent, or `None` at the end of the disk.
    pub(super) fn next(&mut self) -> Result<Option<Extent>, CommandError> {
        if self.fetched.is_empty() && self.position < self.image.size() {
            let rest = span(self.position, self.image.size());
            self.fetched = self.image.extents(rest, BATCH)?.into();
            match self.fetched.back() {
                Some(last) => self.position = last.range.end().bytes(),
                None => {
                    return Err(CommandError::new(format!(
                        "nothing is known about the disk from offset {} on",
                        self.position
                    )));
                }
            }
        }
        Ok(self.fetched.pop_front())
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
