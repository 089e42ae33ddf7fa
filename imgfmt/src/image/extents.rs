//! Walks along a disk, extent by extent.

use std::collections::VecDeque;
use std::fmt;
use std::iter::FusedIterator;
use std::ops::Deref;
use std::sync::Arc;

use super::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentList};
use crate::read;
use crate::units::GuestRange;

/// The default maximum of extents per step: bounds the memory, however fragmented the disk is.
const EXTENTS_PER_STEP: usize = 1024;

/// The maximum of steps for one extent. After them, the part that was found is returned: bounds the
/// time for one extent, however large the disk is.
const STEPS_PER_EXTENT: usize = 64;

/// The extents of a range of a disk: an iterator made by [`Image::extents`] (with `I` = `&Image`)
/// or [`Image::shared_extents`] (`Arc<Image>`).
pub struct Extents<I> {
    image: I,
    /// The part that was not examined yet.
    rest: GuestRange,
    found: VecDeque<Extent>,
    /// The extent found after the last one that was returned.
    ahead: Option<Result<Extent>>,
    steps_left: usize,
    extents_per_step: usize,
    into_blocks: bool,
    /// Whether nothing follows.
    is_over: bool,
}

impl Image {
    /// Returns the extents of a range, in order and without gaps. Equal neighbours are one extent,
    /// except where an extent takes many steps to find its end. The iterator examines metadata as
    /// it advances, and may block; a step takes at most about a millisecond if the metadata is in
    /// memory. An error is the last item.
    ///
    /// # Errors
    ///
    /// `OutOfBounds` if the range goes beyond the end of the disk; `Corrupt`, `Io`.
    ///
    /// ```
    /// use imgfmt::{CreateOptions, Format, Image};
    ///
    /// # fn main() -> imgfmt::Result<()> {
    /// # let directory = tempfile::tempdir().expect("a directory for the example");
    /// # let path = directory.path().join("disk.qcow2");
    /// let disk = Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 40))?;
    /// let mut data = 0;
    /// for extent in disk.extents(disk.whole()) {
    ///     let extent = extent?;
    ///     if extent.kind == imgfmt::ExtentKind::Data {
    ///         data += extent.range.length();
    ///     }
    /// }
    /// assert_eq!(data, 0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn extents(&self, range: GuestRange) -> Extents<&Self> {
        Extents::new(self, range)
    }

    /// Like [`extents`](Self::extents), for an iterator that owns a reference to the image.
    pub fn shared_extents(self: &Arc<Self>, range: GuestRange) -> Extents<Arc<Self>> {
        Extents::new(Arc::clone(self), range)
    }

    /// One step: at least one extent, unless the range is empty.
    fn step(&self, range: GuestRange, max_count: usize, into_blocks: bool) -> Result<Vec<Extent>> {
        let range = self.check("map", range.offset(), range.length())?;
        let mut list = ExtentList::new(max_count);
        if !range.is_empty() {
            let found = read::extents_of(self.layer(), range, &mut list, into_blocks);
            found.map_err(|error| self.name(error))?;
        }
        Ok(list.into_vec())
    }
}

impl<I: Deref<Target = Image>> Extents<I> {
    fn new(image: I, rest: GuestRange) -> Self {
        Self {
            image,
            rest,
            found: VecDeque::new(),
            ahead: None,
            steps_left: usize::MAX,
            extents_per_step: EXTENTS_PER_STEP,
            into_blocks: false,
            is_over: false,
        }
    }

    /// Bounds the time of the iteration: it ends after `steps` steps, perhaps before the end of the
    /// range. Each step finds at most `extents_per_step` extents (1 if 0 is given). The first step
    /// always finds one.
    #[must_use]
    pub fn bounded(mut self, steps: usize, extents_per_step: usize) -> Self {
        (self.steps_left, self.extents_per_step) = (steps, extents_per_step.max(1));
        self
    }

    /// Finds holes of files in the blocks of other programs' formats too. They read as zeroes, but
    /// a block with holes is data to those programs, and to maps.
    #[must_use]
    pub(crate) fn into_blocks(mut self) -> Self {
        self.into_blocks = true;
        self
    }

    /// The next extent as a step found it: the neighbours of one step are joined already.
    fn next_found(&mut self) -> Option<Result<Extent>> {
        if self.found.is_empty()
            && !self.is_over
            && self.steps_left > 0
            && let Err(error) = self.step()
        {
            self.is_over = true;
            return Some(Err(error));
        }
        self.found.pop_front().map(Ok)
    }

    /// Examines more of the range.
    fn step(&mut self) -> Result<()> {
        self.steps_left -= 1;
        self.found = self.image.step(self.rest, self.extents_per_step, self.into_blocks)?.into();
        let start = match self.found.back() {
            Some(last) => last.range.end(),
            None if self.rest.is_empty() => self.rest.end(),
            // An iteration that ended here would look like the end of the disk.
            None => {
                let detail = "nothing is known about the disk from there on";
                let error = Error::new(ErrorKind::Io, "map", detail);
                return Err(self.image.name(error.at(self.rest.offset().bytes())));
            }
        };
        self.rest = GuestRange::between(start, self.rest.end()).unwrap_or_default();
        self.is_over = self.rest.is_empty();
        Ok(())
    }
}

impl<I: Deref<Target = Image>> Iterator for Extents<I> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut extent = match self.ahead.take().or_else(|| self.next_found())? {
            Ok(extent) => extent,
            Err(error) => return Some(Err(error)),
        };
        for _ in 0..STEPS_PER_EXTENT {
            match self.next_found() {
                Some(Ok(next)) if extent.join(&next) => {}
                // Return what was found before the error first.
                ahead => {
                    self.ahead = ahead;
                    break;
                }
            }
        }
        Some(Ok(extent))
    }
}

impl<I: Deref<Target = Image>> FusedIterator for Extents<I> {}

impl<I: Deref<Target = Image>> fmt::Debug for Extents<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extents").field("rest", &self.rest).finish_non_exhaustive()
    }
}
