//! The layers of a chain of images, and the walk through them that maps a range.

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

/// An open image of one format, for the layer above it and for [`Image`](crate::Image). A read-only
/// format needs no other trait. Every range passed in is within [`size`](Self::size) and not empty.
pub(crate) trait Layer: Send + Sync + fmt::Debug {
    fn size(&self) -> u64;

    /// Pushes the parts of a range into the walk, in order and without gaps, to the end of the
    /// range or until the walk stops. Parts without content in this layer are mapped with
    /// [`Backing::map`].
    fn map(&self, range: GuestRange, walk: &mut Walk<'_>) -> Result<Mapped>;

    /// Reads a part of what this layer has mapped as encoded, from `offset` on.
    fn decode(&self, _encoded: Encoded, offset: GuestOffset, _buffer: &mut [u8]) -> Result<()> {
        let detail = "the format has no encoded clusters";
        Err(Error::new(ErrorKind::Unsupported, "read", detail).at(offset.bytes()))
    }

    /// For a part that this layer has mapped as a hole, from `offset` on: the place that its file
    /// keeps there all the same, if there is one, and the length, at least 1, for which that is so.
    fn kept_for_zeroes(&self, _offset: GuestOffset) -> Result<(Option<HostOffset>, u64)> {
        Ok((None, u64::MAX))
    }

    /// Whether this layer has no content in a range, not even zeroes, so that all of it shows the
    /// layer below; `None` if that would take waiting, and `lookup` forbids it. `false` may be
    /// wrong.
    fn lacks(&self, _range: GuestRange, _lookup: Lookup) -> Result<Option<bool>> {
        Ok(Some(false))
    }

    /// The layer below it, if that stays there: below the image itself, it can be replaced, and is
    /// not told.
    fn backing(&self) -> Option<&Backing> {
        None
    }

    /// Protects clusters that are mapped from now on from reuse for other parts of the disk; `None`
    /// if they are never reused.
    fn lease(&self) -> Option<Lease> {
        None
    }

    /// Converts an error of this layer's storage.
    fn io_error(&self, operation: &'static str, error: io::Error, offset: GuestOffset) -> Error {
        Error::from_io(operation, error).at(offset.bytes())
    }
}

/// A new image that is filled from the start to the end, in units each of which is encoded on its
/// own and then appended. Units that are left out are zero.
pub(crate) trait FilledInOrder: Send + Sync {
    /// The size of a unit in bytes.
    fn unit(&self) -> u64;
    /// Encodes a unit. Several threads may do that at once.
    fn encode(&self, offset: GuestOffset, data: &[u8]) -> Result<Vec<u8>>;
    /// Writes the next unit, which was encoded.
    fn append(&self, offset: GuestOffset, encoded: &[u8]) -> Result<()>;
}

/// An image that can be changed. Methods that change it are not called if it was opened read-only.
pub(crate) trait WritableLayer: Layer {
    fn capabilities(&self) -> Capabilities;
    fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()>;
    /// Writes if that needs neither waiting nor new space; returns whether it did.
    fn try_write_at(&self, offset: GuestOffset, data: &[u8]) -> Result<TryWrite>;
    /// Finds the place of a write that the caller carries out completely, and that is durable only
    /// after a flush; `None` if there is no single place, or if the lookup would wait.
    fn map_write(&self, _offset: GuestOffset, _length: u64) -> Result<Option<WriteMap>> {
        Ok(None)
    }
    /// Writes complete clusters, compressed if the format supports it.
    fn write_compressed(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        self.write_at(offset, data, Durability::Cached)
    }
    /// The image as one that is filled in order, if it has to be. It is complete, and can be read,
    /// only when it is closed.
    fn filled_in_order(&self) -> Option<&dyn FilledInOrder> {
        None
    }
    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode, speed: Speed) -> Result<()>;
    fn discard(&self, range: GuestRange) -> Result<()>;
    fn flush(&self) -> Result<()>;
    /// Flushes after a change that has to be durable. Zeroes and discards leave that to their
    /// caller.
    fn flush_if(&self, durability: Durability) -> Result<()> {
        match durability {
            Durability::Cached => Ok(()),
            Durability::Fua => self.flush(),
        }
    }
    /// Marks the disk durably as incomplete or complete, if the format supports that.
    fn mark_incomplete(&self, _is_incomplete: bool) -> Result<()> {
        Ok(())
    }
    /// Flushes, and marks the image as closed properly. Nothing is changed afterwards.
    fn close(&self) -> Result<()> {
        self.flush()
    }
    /// Changes the size of the disk; the added part reads as zero.
    fn resize(&mut self, size: u64) -> Result<()>;
}

/// The layer below another one, which has the content that the other one lacks.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) layer: Arc<dyn Layer>,
    pub(crate) size: u64,
    /// The cache for the layers below this one's owner, if walks begin at the owner.
    known: Lazy<dyn Layer>,
}

/// A walk over the parts of a range, through all layers.
pub(crate) struct Walk<'w> {
    pub(crate) holes: Holes,
    pub(crate) lookup: Lookup,
    /// The depth of the layer that is being asked.
    depth: u32,
    /// The number of table entries that may still be examined, in all layers together.
    effort: u64,
    has_found: bool,
    is_reader: bool,
    /// Whether holes of a file count that lie in the blocks of a format.
    looks_into_blocks: bool,
    visit: &'w mut Visit<'w>,
}

/// Called with each mapping and its layer; returns false to stop the walk.
pub(crate) type Visit<'w> = dyn FnMut(&dyn Layer, Mapping<'_>) -> Result<bool> + 'w;

/// The cost of asking the system for the holes of a file, in table entries.
const EFFORT_OF_CALL: u64 = 128;

/// The maximum number of parts of a range of a file that are distinguished, if the effort is not
/// bounded.
const FILE_PARTS_MAX: u64 = 4096;

impl<'w> Walk<'w> {
    /// The walk of a reader of the disk.
    pub(crate) fn new(holes: Holes, lookup: Lookup, visit: &'w mut Visit<'w>) -> Self {
        let (depth, effort, has_found, is_reader) = (1, u64::MAX, false, true);
        let looks_into_blocks = false;
        Self { holes, lookup, depth, effort, has_found, is_reader, looks_into_blocks, visit }
    }

    /// Makes it the walk of a list of extents, which ends when this many table entries were
    /// examined and something was found.
    pub(crate) fn with_effort(self, effort: u64) -> Self {
        Self { effort, is_reader: false, ..self }
    }

    /// Makes it one that tells holes of files in the blocks of other programs' formats, which maps
    /// as those programs show them do not.
    pub(crate) fn into_blocks(self, looks_into_blocks: bool) -> Self {
        Self { looks_into_blocks, ..self }
    }

    /// Makes it the walk of a job that copies the layers below.
    pub(crate) fn of_job(self) -> Self {
        Self { is_reader: false, ..self }
    }

    /// Passes on the next part of the range, whose content `layer` has.
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

    /// Passes on a part whose bytes are in a storage, with its holes if they are requested; `hole`
    /// is their content.
    pub(crate) fn push_file(
        &mut self,
        layer: &dyn Layer,
        range: GuestRange,
        file: FileSpan<'_>,
        hole: Content<'_>,
    ) -> Result<Mapped> {
        // For a list of extents, ask anew: other programs may have punched holes.
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
                // So many holes in one place are not worth the calls.
                (rest, false)
            } else {
                let found = file.storage.next_extent(offset, inside).map_err(io)?;
                // An empty or excessive answer must not cause a loop or an overrun.
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

    /// Counts examined metadata.
    #[inline]
    pub(crate) fn spend(&mut self, effort: u64) {
        self.effort = self.effort.saturating_sub(effort);
    }

    /// Whether the walk is that of a reader of the disk.
    #[inline]
    pub(crate) fn is_reader(&self) -> bool {
        self.is_reader
    }

    /// Whether holes of a file count that lie in the blocks of a format.
    pub(crate) fn looks_into_blocks(&self) -> bool {
        self.looks_into_blocks
    }

    /// Whether the effort is used up.
    #[inline]
    pub(crate) fn is_tired(&self) -> bool {
        self.effort == 0 && self.has_found
    }
}

impl Backing {
    pub(crate) fn new(layer: Arc<dyn Layer>) -> Self {
        Self { size: layer.size(), layer, known: Lazy::new() }
    }

    /// Maps a part that `above` has no content for: from the layer below it, if there is one, and
    /// as zeroes past the end of that.
    pub(crate) fn map(
        backing: Option<&Self>,
        above: &dyn Layer,
        range: GuestRange,
        walk: &mut Walk<'_>,
    ) -> Result<Mapped> {
        match backing {
            // With one layer below, none can be skipped.
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

    /// As [`map`](Self::map), starting at the layer that has content; this is the first one below
    /// the top.
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

    /// The number of layers, from this one on, without content in the complete granule of a guest
    /// offset; `None` if that would take waiting.
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
                // Beyond its end it reads as zero.
                break;
            }
            match layer.lacks(range, lookup) {
                Ok(Some(true)) => {}
                Ok(Some(false)) => break,
                Ok(None) => return Ok(None),
                // The error may be in a part of the granule that was not requested.
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
        // The layer below is the one that ends there.
        let behind = span(range.offset().bytes().max(*size), range.end().bytes());
        walk.push_of_depth(above, behind, Content::Hole, walk.depth + 1)
    }
}

#[cfg(test)]
mod tests;
