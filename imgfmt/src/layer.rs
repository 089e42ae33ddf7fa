//! Layers: what a chain of images consists of, and the walk through it that finds what a range is.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::ExtentKind;
use crate::known_depths::{Granule, KnownDepths, Lazy, RANGE_MAX};
use crate::lease::Lease;
use crate::mapping::{Content, Encoded, FileSpan, Holes, Lookup, Mapped, Mapping};
use crate::storage::{Capabilities, Durability, Speed, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset, span};
use crate::write_map::WriteMap;

/// An open image of one format, as the layer above it sees it and as [`Image`](crate::Image) reads it.
/// A format that is only read needs nothing else. Every range handed in lies within
/// [`size`](Self::size) and is not empty.
pub(crate) trait Layer: Send + Sync + fmt::Debug {
    fn size(&self) -> u64;

    /// Pushes what a range consists of into the walk, in order and without gaps, from its start on
    /// until its end, or until the walk wants no more. What this layer has not got it maps with
    /// [`Backing::map`].
    fn map(&self, range: GuestRange, walk: &mut Walk<'_>) -> Result<Mapped>;

    /// Reads what this layer has mapped as encoded: the part of it from `offset` on.
    fn decode(&self, _encoded: Encoded, offset: GuestOffset, _buffer: &mut [u8]) -> Result<()> {
        let detail = "the format has no encoded clusters";
        Err(Error::new(ErrorKind::Unsupported, "read", detail).at(offset.bytes()))
    }

    /// Whether this layer has nothing in a range, not even zeroes, so that all of it shows the layer
    /// below; `None` if that would take waiting, and `lookup` forbids it. "No" may be wrong.
    fn lacks(&self, _range: GuestRange, _lookup: Lookup) -> Result<Option<bool>> {
        Ok(Some(false))
    }

    /// The layer below it.
    fn backing(&self) -> Option<&Backing> {
        None
    }

    /// Keeps the places that are mapped from now on from being given to other parts of the disk;
    /// `None` if that never happens.
    fn lease(&self) -> Option<Lease> {
        None
    }

    /// The error of this layer that an error of its storage makes.
    fn io_error(&self, operation: &'static str, error: io::Error, offset: GuestOffset) -> Error {
        Error::from_io(operation, error).at(offset.bytes())
    }
}

/// An image that can be changed. Nothing that changes it is called on one opened read-only.
pub(crate) trait WritableLayer: Layer {
    fn capabilities(&self) -> Capabilities;
    fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()>;
    /// Writes if that needs neither waiting nor new space; says whether it did.
    fn try_write_at(&self, offset: GuestOffset, data: &[u8]) -> Result<TryWrite>;
    /// Finds the place of a write that the caller carries out, in whole and durable only after a flush;
    /// `None` if there is not one such place, or if that takes waiting.
    fn map_write(&self, _offset: GuestOffset, _length: u64) -> Result<Option<WriteMap>> {
        Ok(None)
    }
    /// Writes whole clusters, compressed where the format can.
    fn write_compressed(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        self.write_at(offset, data, Durability::Cached)
    }
    fn write_zeroes(
        &self,
        range: GuestRange,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<()>;
    fn discard(&self, range: GuestRange, durability: Durability) -> Result<()>;
    fn flush(&self) -> Result<()>;
    /// Says durably, where the format has a place for it, whether the disk is a mixture of two.
    fn mark_incomplete(&self, _is_incomplete: bool) -> Result<()> {
        Ok(())
    }
    /// Flushes, and leaves the image in the state in which it should be found. Nothing is changed
    /// afterwards.
    fn close(&self) -> Result<()> {
        self.flush()
    }
    /// Changes the size of the disk; what is added reads as zero.
    fn resize(&mut self, size: u64) -> Result<()>;
}

/// The layer below another one, which has what that one has not.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) layer: Arc<dyn Layer>,
    pub(crate) size: u64,
    /// Of the layers below the one that has this, if walks begin there.
    known: Lazy<dyn Layer>,
}

/// A walk over what a range consists of, through all layers.
pub(crate) struct Walk<'w> {
    pub(crate) holes: Holes,
    pub(crate) lookup: Lookup,
    /// Of the layer that is being asked.
    depth: u32,
    /// How much metadata may still be examined, in all layers together: entries of tables.
    effort: u64,
    has_found: bool,
    visit: &'w mut Visit<'w>,
}

/// What a walk does with a mapping and the layer that has it; false if no more are wanted.
pub(crate) type Visit<'w> = dyn FnMut(&dyn Layer, Mapping<'_>) -> Result<bool> + 'w;

/// What asking the system about the holes of a file takes, in entries of a table.
const EFFORT_OF_CALL: u64 = 128;

/// Most parts of a range of a file that are told apart, if the effort is not bounded.
const FILE_PARTS_MAX: u64 = 4096;

impl<'w> Walk<'w> {
    pub(crate) fn new(holes: Holes, lookup: Lookup, visit: &'w mut Visit<'w>) -> Self {
        Self { holes, lookup, depth: 1, effort: u64::MAX, has_found: false, visit }
    }

    /// Has the walk end when so much was examined, and something found.
    pub(crate) fn with_effort(self, effort: u64) -> Self {
        Self { effort, ..self }
    }

    /// Passes on the next part of the range, which `layer` has.
    #[inline]
    pub(crate) fn push(
        &mut self,
        layer: &dyn Layer,
        range: GuestRange,
        content: Content<'_>,
    ) -> Result<Mapped> {
        self.push_of_depth(layer, range, content, self.depth)
    }

    fn push_of_depth(
        &mut self,
        layer: &dyn Layer,
        range: GuestRange,
        content: Content<'_>,
        depth: u32,
    ) -> Result<Mapped> {
        if range.is_empty() {
            return Ok(Mapped::Complete);
        }
        self.has_found = true;
        match (self.visit)(layer, Mapping { range, content, depth })? {
            true => Ok(Mapped::Complete),
            false => Ok(Mapped::Partial),
        }
    }

    /// Passes on a part whose bytes lie in a storage, with the holes that it has there if they are
    /// to be told; `hole` says what they are.
    pub(crate) fn push_file(
        &mut self,
        layer: &dyn Layer,
        range: GuestRange,
        file: FileSpan<'_>,
        hole: Content<'_>,
    ) -> Result<Mapped> {
        // A list of extents is asked for afresh: others may have made holes.
        let may_be_known = self.effort == u64::MAX;
        if self.holes == Holes::AsData
            || may_be_known && file.storage.is_known_data(file.offset, range.length())
        {
            return self.push(layer, range, Content::File(file));
        }
        if self.lookup == Lookup::CachedOnly {
            let file = FileSpan { may_have_holes: true, ..file };
            return self.push(layer, range, Content::File(file));
        }
        let io = |error| layer.io_error("look for holes in", error, range.offset());
        let length = if file.may_pass_end { file.storage.len().map_err(io)? } else { u64::MAX };
        let (start, end) = (range.offset().bytes(), range.end().bytes());
        let mut position = start;
        let mut parts = 0;
        while position < end {
            self.spend(EFFORT_OF_CALL);
            let offset = HostOffset::new(file.offset.bytes() + (position - start));
            let rest = end - position;
            let inside = rest.min(length.saturating_sub(offset.bytes()));
            let (found, is_hole) = if inside == 0 {
                (rest, true)
            } else if parts == FILE_PARTS_MAX {
                // Where so many holes lie together they are not worth the calls.
                (rest, false)
            } else {
                let found = file.storage.next_extent(offset, inside).map_err(io)?;
                // An answer of nothing or of too much must not cause a loop or an overrun.
                (found.length.clamp(1, inside), found.kind != ExtentKind::Data)
            };
            parts += 1;
            let content = if is_hole { hole } else { Content::File(FileSpan { offset, ..file }) };
            let mapped = self.push(layer, span(position, position + found), content)?;
            position += found;
            if mapped != Mapped::Complete || self.is_tired() && position < end {
                return Ok(Mapped::Partial);
            }
        }
        Ok(Mapped::Complete)
    }

    /// Notes that metadata was examined.
    #[inline]
    pub(crate) fn spend(&mut self, effort: u64) {
        self.effort = self.effort.saturating_sub(effort);
    }

    /// Whether enough was examined.
    #[inline]
    pub(crate) fn is_tired(&self) -> bool {
        self.effort == 0 && self.has_found
    }
}

impl Backing {
    pub(crate) fn new(layer: Arc<dyn Layer>) -> Self {
        Self { size: layer.size(), layer, known: Lazy::new() }
    }

    /// Maps what `above` has not got: as the layer below it has it, if there is one, and as zeroes
    /// past the end of that.
    pub(crate) fn map(
        backing: Option<&Self>,
        above: &dyn Layer,
        range: GuestRange,
        walk: &mut Walk<'_>,
    ) -> Result<Mapped> {
        match backing {
            // With one layer below there is nothing to skip.
            Some(first)
                if walk.depth == 1
                    && range.length() <= RANGE_MAX
                    && first.layer.backing().is_some() =>
            {
                first.map_by_granules(above, range, walk)
            }
            _ => Self::map_next(backing, above, range, walk),
        }
    }

    /// As [`map`](Self::map), from the layer on that has something; this is the first one below the
    /// top.
    fn map_by_granules(
        &self,
        top: &dyn Layer,
        range: GuestRange,
        walk: &mut Walk<'_>,
    ) -> Result<Mapped> {
        let known = self.known.get_or_init(|| KnownDepths::new(self.layers(), self.size));
        let (mut position, end) = (range.offset().bytes(), range.end().bytes());
        let mut next = None;
        while position < end {
            let skipped = match next.take() {
                Some(skipped) => skipped,
                None => self.layers_without(known, position, walk.lookup)?,
            };
            let Some(skipped) = skipped else { return Ok(Mapped::WouldBlock) };
            let mut stop = end.min(Granule::of(position).range().end().bytes());
            walk.spend(1);
            // Granules that the same layer has are mapped at once.
            while stop < end {
                let following = self.layers_without(known, stop, walk.lookup)?;
                if following != Some(skipped) {
                    next = Some(following);
                    break;
                }
                stop = end.min(Granule::of(stop).range().end().bytes());
                walk.spend(1);
            }
            let above = match skipped.checked_sub(1) {
                None => top,
                Some(last) => &*known.layers[last],
            };
            let backing = if skipped == 0 { Some(self) } else { above.backing() };
            walk.depth += skipped as u32;
            let mapped = Self::map_next(backing, above, span(position, stop), walk);
            walk.depth -= skipped as u32;
            let mapped = mapped?;
            position = stop;
            if mapped != Mapped::Complete || walk.is_tired() && position < end {
                return Ok(if mapped == Mapped::Complete { Mapped::Partial } else { mapped });
            }
        }
        Ok(Mapped::Complete)
    }

    /// This layer and all below it.
    fn layers(&self) -> Vec<Arc<dyn Layer>> {
        let backings = std::iter::successors(Some(self), |backing| backing.layer.backing());
        backings.map(|backing| Arc::clone(&backing.layer)).collect()
    }

    /// How many layers, from this one on, have nothing in the whole granule of a guest offset; `None` if
    /// that would take waiting.
    fn layers_without(
        &self,
        known: &KnownDepths<dyn Layer>,
        guest: u64,
        lookup: Lookup,
    ) -> Result<Option<usize>> {
        let granule = Granule::of(guest);
        if let Some(count) = known.get(granule) {
            return Ok(Some(count));
        }
        let (range, mut count, mut next) = (granule.range(), 0, Some(self));
        while let Some(Self { layer, size, .. }) = next {
            if range.end().bytes() > *size {
                // What follows its end reads as zero.
                break;
            }
            match layer.lacks(range, lookup) {
                Ok(Some(true)) => {}
                Ok(Some(false)) => break,
                Ok(None) => return Ok(None),
                // It may lie in a part of the granule that nobody wants.
                Err(_) => return Ok(Some(count)),
            }
            count += 1;
            next = layer.backing();
        }
        known.note(granule, count);
        Ok(Some(count))
    }

    fn map_next(
        backing: Option<&Self>,
        above: &dyn Layer,
        range: GuestRange,
        walk: &mut Walk<'_>,
    ) -> Result<Mapped> {
        let Some(Self { layer, size, .. }) = backing else {
            return walk.push_of_depth(above, range, Content::Hole, 0);
        };
        let inside = range.intersection(span(0, *size));
        if !inside.is_empty() {
            walk.depth += 1;
            let mapped = layer.map(inside, walk);
            walk.depth -= 1;
            let mapped = mapped?;
            if mapped != Mapped::Complete {
                return Ok(mapped);
            }
        }
        // It is the layer below that ends there.
        let behind = span(range.offset().bytes().max(*size), range.end().bytes());
        walk.push_of_depth(above, behind, Content::Hole, walk.depth + 1)
    }
}

#[cfg(test)]
mod tests;
