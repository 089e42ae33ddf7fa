//! Walks along disks: extent by extent, and along two disks at once.

use std::collections::VecDeque;

use imgfmt::{Extent, ExtentKind, GuestOffset, GuestRange, Image};

use crate::error::CommandError;

/// How many extents are fetched at a time: bounds the memory, however fragmented the disk is.
const BATCH: usize = 1024;
/// How much of two disks is compared at a time, in bytes.
const STEP: u64 = 1 << 20;

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

/// Where a disk holds data, found step by step.
#[derive(Debug)]
struct Cursor<'a> {
    extents: Extents<'a>,
    current: Option<Extent>,
    size: u64,
}

impl<'a> Cursor<'a> {
    fn new(image: &'a Image) -> Self {
        Self { extents: Extents::new(image), current: None, size: image.size() }
    }

    /// What is at `offset`, which never goes back, and where that ends. Zero behind the disk.
    fn at(&mut self, offset: u64) -> Result<(ExtentKind, u64), CommandError> {
        if offset >= self.size {
            return Ok((ExtentKind::Hole, u64::MAX));
        }
        loop {
            match self.current {
                Some(extent) if extent.range.end().bytes() > offset => {
                    return Ok((extent.kind, extent.range.end().bytes()));
                }
                _ => self.current = self.extents.next()?,
            }
            if self.current.is_none() {
                return Ok((ExtentKind::Hole, u64::MAX));
            }
        }
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

/// The first offset at which two disks differ, if there is one before `end`. A disk reads as zero
/// behind its end. `done` is called with the number of bytes that were found to be the same.
pub(super) fn first_difference(
    first: &Image,
    second: &Image,
    end: u64,
    mut done: impl FnMut(u64),
) -> Result<Option<u64>, CommandError> {
    let (mut left, mut right) = (Cursor::new(first), Cursor::new(second));
    let (mut a, mut b) = (vec![0; STEP as usize], vec![0; STEP as usize]);
    let mut position = 0;
    while position < end {
        let (left_kind, left_end) = left.at(position)?;
        let (right_kind, right_end) = right.at(position)?;
        let same_until = left_end.min(right_end).min(end);
        let is_zero = left_kind != ExtentKind::Data && right_kind != ExtentKind::Data;
        let stop = if is_zero { same_until } else { same_until.min(position + STEP) };
        if !is_zero {
            let length = (stop - position) as usize;
            read_padded(first, position, &mut a[..length])?;
            read_padded(second, position, &mut b[..length])?;
            if a[..length] != b[..length] {
                let differs = a.iter().zip(&b).position(|(a, b)| a != b).unwrap_or_default();
                return Ok(Some(position + differs as u64));
            }
        }
        done(stop - position);
        position = stop;
    }
    Ok(None)
}
