//! Uses of a walk over a range: reads, lists of extents, and maps for callers that transfer the
//! bytes themselves.

use std::sync::Arc;

use crate::error::Result;
use crate::extent::{Extent, ExtentList};
use crate::layer::{Layer, Walk};
use crate::mapping::{Content, Encoded, FileSpan, Holes, Lookup, Mapped, Mapping};
use crate::storage::TryRead;
use crate::units::{GuestOffset, GuestRange, HostOffset, Offset as _, span};

/// Holes of files are seldom smaller than this, in bytes.
const BLOCK: usize = 4096;

/// Maximum number of table entries that are examined for one list of extents.
const EFFORT_MAX: u64 = 1 << 16;

/// Fills `buffer` with the bytes at `offset`. The caller holds a lease.
pub(crate) fn read_at(layer: &dyn Layer, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
    read_by(layer, offset, buffer, |walk| walk)
}

/// As [`read_at`], for a job that copies what is below the image, and wants nothing itself.
pub(crate) fn read_for_job(
    layer: &dyn Layer,
    offset: GuestOffset,
    buffer: &mut [u8],
) -> Result<()> {
    read_by(layer, offset, buffer, |walk| walk.of_job())
}

#[inline]
fn read_by(
    layer: &dyn Layer,
    offset: GuestOffset,
    buffer: &mut [u8],
    whose: impl for<'w> FnOnce(Walk<'w>) -> Walk<'w>,
) -> Result<()> {
    let range = range_of(offset, buffer);
    let mut visit = |layer: &dyn Layer, mapping: Mapping<'_>| {
        read_mapping(layer, &mapping, part_of(buffer, offset, mapping.range)).map(|()| true)
    };
    let walk = Walk::new(Holes::AsData, Lookup::MayRead, &mut visit);
    layer.map(range, &mut whose(walk)).map(drop)
}

fn read_mapping(layer: &dyn Layer, mapping: &Mapping<'_>, buffer: &mut [u8]) -> Result<()> {
    let offset = mapping.range.offset();
    match mapping.content {
        Content::Hole | Content::Zero => buffer.fill(0),
        Content::Encoded(encoded) => layer.decode(encoded, offset, buffer)?,
        Content::File(file) if file.may_pass_end => {
            let read = file.storage.read_at(file.offset, buffer);
            let read = read.map_err(|error| layer.io_error("read", error, offset))?;
            buffer[read..].fill(0);
        }
        Content::File(file) => {
            let read = file.storage.read_exact_at(file.offset, buffer);
            read.map_err(|error| layer.io_error("read", error, offset))?;
        }
    }
    Ok(())
}

/// Fills `buffer` with the bytes at `offset` if that needs no waiting. With [`Holes::Told`] it
/// gives up at the first hole.
pub(crate) fn try_read_at(
    layer: &dyn Layer,
    offset: GuestOffset,
    buffer: &mut [u8],
    holes: Holes,
) -> Result<TryRead> {
    let range = range_of(offset, buffer);
    let mut outcome = TryRead::Complete;
    let mut visit = |layer: &dyn Layer, mapping: Mapping<'_>| {
        let part = part_of(buffer, offset, mapping.range);
        outcome = try_read_mapping(layer, &mapping, part, holes)?;
        Ok(outcome == TryRead::Complete)
    };
    let mut walk = Walk::new(holes, Lookup::CachedOnly, &mut visit);
    match layer.map(range, &mut walk)? {
        Mapped::WouldBlock | Mapped::HolesUnknown => Ok(TryRead::WouldBlock),
        Mapped::Complete | Mapped::Partial => Ok(outcome),
    }
}

fn try_read_mapping(
    layer: &dyn Layer,
    mapping: &Mapping<'_>,
    buffer: &mut [u8],
    holes: Holes,
) -> Result<TryRead> {
    match mapping.content {
        Content::Hole | Content::Zero if holes == Holes::Told => Ok(TryRead::Sparse),
        Content::Hole | Content::Zero => {
            buffer.fill(0);
            Ok(TryRead::Complete)
        }
        Content::Encoded(_) => Ok(TryRead::WouldBlock),
        Content::File(file) => match file.storage.try_read_at(file.offset, buffer) {
            // To find out whether zeroes are a hole may take waiting.
            Ok(TryRead::Complete) if file.may_have_holes && !is_surely_data(buffer) => {
                Ok(TryRead::WouldBlock)
            }
            // The last cluster may extend past the end of the file.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Ok(TryRead::WouldBlock)
            }
            read => read.map_err(|error| layer.io_error("read", error, mapping.range.offset())),
        },
    }
}

/// Calls `each` with the mappings of a range in turn, until it returns false. The caller can
/// transfer the mapped bytes itself.
pub(crate) fn map(
    layer: &dyn Layer,
    range: GuestRange,
    (holes, lookup): (Holes, Lookup),
    mut each: impl FnMut(Mapping<'_>) -> bool,
) -> Result<Mapped> {
    let mut is_unknown = false;
    let mut known_length: Option<(*const (), u64)> = None;
    let mut visit = |layer: &dyn Layer, mapping: Mapping<'_>| {
        let Content::File(file) = mapping.content else { return Ok(each(mapping)) };
        if file.may_have_holes {
            is_unknown = true;
            return Ok(false);
        }
        if !file.may_pass_end {
            return Ok(each(mapping));
        }
        let identity = Arc::as_ptr(file.storage).cast::<()>();
        let length = match known_length {
            Some((known, length)) if known == identity => length,
            _ => {
                let io = |error| layer.io_error("map", error, mapping.range.offset());
                file.storage.len().map_err(io)?
            }
        };
        known_length = Some((identity, length));
        let (inside, behind) = split_at_end(mapping, file, length, holes);
        Ok((inside.range.is_empty() || each(inside)) && (behind.range.is_empty() || each(behind)))
    };
    let mapped = layer.map(range, &mut Walk::new(holes, lookup, &mut visit))?;
    Ok(if is_unknown { Mapped::HolesUnknown } else { mapped })
}

/// Splits stored bytes at the end of the storage, of `length` bytes: the rest reads as zero, but is
/// not a hole.
fn split_at_end<'a>(
    mapping: Mapping<'a>,
    file: FileSpan<'a>,
    length: u64,
    holes: Holes,
) -> (Mapping<'a>, Mapping<'a>) {
    let (start, end) = (mapping.range.offset().bytes(), mapping.range.end().bytes());
    let stop = start + length.saturating_sub(file.offset.bytes()).min(mapping.range.length());
    let behind = match holes {
        Holes::AsData => Content::Zero,
        Holes::Told => Content::Encoded(Encoded::compressed(file.offset, 0)),
    };
    (
        Mapping { range: span(start, stop), ..mapping },
        Mapping { range: span(stop, end), content: behind, ..mapping },
    )
}

/// Calls `each` with the parts of a range, in order and without gaps, and the places that files
/// keep for those that read as zero by metadata alone. All of the range reads as zero.
pub(crate) fn kept_for_zeroes(
    layer: &dyn Layer,
    range: GuestRange,
    mut each: impl FnMut(GuestRange, Option<HostOffset>),
) -> Result<()> {
    let mut visit = |layer: &dyn Layer, mapping: Mapping<'_>| {
        let (mut position, end) = (mapping.range.offset(), mapping.range.end());
        while position < end {
            let (place, length) = match mapping.content {
                Content::Hole => layer.kept_for_zeroes(position)?,
                // Past the end of the file.
                Content::File(file) if file.may_pass_end && file.is_file_content => {
                    (Some(file.offset), u64::MAX)
                }
                _ => (None, u64::MAX),
            };
            let stop = end.min(position.saturating_add(length.max(1)));
            each(span(position, stop), place);
            position = stop;
        }
        Ok(true)
    };
    layer.map(range, &mut Walk::new(Holes::AsData, Lookup::MayRead, &mut visit)).map(drop)
}

/// Appends the extents of a range to a list, to the end of the range or until the list is full.
pub(crate) fn extents(layer: &dyn Layer, range: GuestRange, list: &mut ExtentList) -> Result<()> {
    extents_of(layer, range, list, false)
}

/// The same; `into_blocks`: holes of files count wherever they are zeroes of the disk.
pub(crate) fn extents_of(
    layer: &dyn Layer,
    range: GuestRange,
    list: &mut ExtentList,
    into_blocks: bool,
) -> Result<()> {
    let mut visit = |_: &dyn Layer, Mapping { range, content, depth }: Mapping<'_>| {
        Ok(list.push(Extent { range, kind: content.kind(), depth }))
    };
    // Finding the end of an extent of a huge disk could take hours.
    let walk = Walk::new(Holes::Told, Lookup::MayRead, &mut visit).into_blocks(into_blocks);
    layer.map(range, &mut walk.with_effort(EFFORT_MAX)).map(drop)
}

/// Starts to read a range into memory.
pub(crate) fn readahead(layer: &dyn Layer, range: GuestRange) -> Result<()> {
    let mut visit = |layer: &dyn Layer, mapping: Mapping<'_>| {
        if let Content::File(file) = mapping.content {
            let ahead = file.storage.readahead(file.offset, mapping.range.length());
            let io = |error| layer.io_error("read ahead in", error, mapping.range.offset());
            ahead.map_err(io)?;
        }
        Ok(true)
    };
    layer.map(range, &mut Walk::new(Holes::AsData, Lookup::MayRead, &mut visit)).map(drop)
}

fn range_of(offset: GuestOffset, buffer: &[u8]) -> GuestRange {
    span(offset.bytes(), offset.bytes() + buffer.len() as u64)
}

/// The part of a buffer that begins at `offset` of the disk.
#[inline]
fn part_of(buffer: &mut [u8], offset: GuestOffset, range: GuestRange) -> &mut [u8] {
    let start = (range.offset().bytes() - offset.bytes()) as usize;
    &mut buffer[start..start + range.length() as usize]
}

/// Whether the content alone shows that there is no hole. `false` proves nothing.
fn is_surely_data(content: &[u8]) -> bool {
    content.chunks(BLOCK).all(|block| block.iter().take(16).any(|byte| *byte != 0))
}
