//! New VMDK images in several files: a descriptor, and extents of all of the disk
//! (`monolithicFlat`) or of at most 2 GiB each.
//!
//! The descriptor is written when everything else is: until then its file is empty, and no program
//! takes an extent for the disk.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::descriptor::{EXTENTS_MAX, SECTOR};
use super::new::{GRAIN, descriptor, flat, is_quotable, sparse};
use crate::create_options::invalid;
use crate::error::{Error, ErrorKind, Result};
use crate::foreign_options::Subformat;
use crate::formats::new::{Extents, InOrder, NewForeign, OTHER_FORMATS, Planned, too_large};
use crate::layer::{Layer, Walk, WritableLayer};
use crate::mapping::Mapped;
use crate::storage::{Capabilities, Durability, Speed, Storage, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset, span};

/// The longest extent of a disk that is split, in bytes.
const EXTENT_MAX: u64 = 2 << 30;

pub(super) fn plan(new: &NewForeign<'_>, size: u64) -> Result<Planned> {
    let is_flat = new.options.subformat == Subformat::Fixed;
    let (kind, unit, mark) = match (is_flat, new.options.split_extents) {
        (true, false) => ("monolithicFlat", size, ""),
        (true, true) => ("twoGbMaxExtentFlat", EXTENT_MAX, "f"),
        (false, _) => ("twoGbMaxExtentSparse", EXTENT_MAX, "s"),
    };
    if size.div_ceil(unit) > EXTENTS_MAX as u64 {
        return Err(too_large(size, "VMDK in files of 2 GiB", "8 TiB"));
    }
    let name = new.name().as_bytes();
    // With a colon, names of extents are taken for something else than files when they are read.
    if !is_quotable(name) || name.contains(&b':') {
        return Err(invalid(
            "the name of a VMDK in several files has neither quotes nor colons nor line ends",
        ));
    }
    let stem = name.iter().rposition(|byte| *byte == b'.').unwrap_or(name.len());
    let (stem, ending) = name.split_at(stem);
    let (mut lines, mut extents, mut length) = (Vec::new(), Vec::new(), 0);
    for (number, start) in (1..).zip((0..size).step_by(unit as usize)) {
        let place = (start, unit.min(size - start));
        let part = match mark {
            "" => "-flat".to_owned(),
            mark => format!("-{mark}{number:03}"),
        };
        let file = [stem, part.as_bytes(), ending].concat();
        let word = if is_flat { "FLAT" } else { "SPARSE" };
        lines.extend(format!("RW {} {word} \"", place.1 / SECTOR).into_bytes());
        lines.extend(&file);
        lines.extend(if is_flat { &b"\" 0\n"[..] } else { b"\"\n" });
        let planned = if is_flat { flat(place) } else { sparse(new, place, None)? };
        length += (planned.length)(0);
        extents.push((OsString::from_vec(file), planned));
    }
    let text = descriptor(new, size, kind, &lines)?;
    length += text.len() as u64;
    let length = move |count| if is_flat { length } else { length + count * GRAIN };
    let begin = move |storage, extents, _: fn() -> bool| {
        let (is_described, has_failed) = Default::default();
        Ok(Box::new(Split { storage, text, size, extents, is_described, has_failed }) as _)
    };
    let in_order = InOrder::No(OTHER_FORMATS);
    let (length, begin) = (Box::new(length), Box::new(begin));
    Ok(Planned { size, block_size: GRAIN, length, in_order, extents, begin })
}

/// A new image that is being filled.
#[derive(Debug)]
struct Split {
    /// The file of the descriptor.
    storage: Arc<dyn Storage>,
    text: Vec<u8>,
    size: u64,
    extents: Extents,
    /// Whether the descriptor is written.
    is_described: AtomicBool,
    /// Whether an operation has failed: data is then missing that its user wanted to write.
    has_failed: AtomicBool,
}

impl Split {
    /// The extents that a range lies in, with its part in each.
    fn parts(&self, range: GuestRange) -> impl Iterator<Item = (&dyn WritableLayer, GuestRange)> {
        let mut end = 0;
        let parts = self.extents.iter().map(move |extent| {
            let start = end;
            end += extent.size();
            (&**extent, span(start, end).intersection(range))
        });
        parts.filter(|(_, part)| !part.is_empty())
    }

    /// Writes what there is, and the descriptor last.
    fn finish(&self) -> Result<()> {
        self.extents.iter().try_for_each(|extent| extent.flush())?;
        if !self.is_described.load(Ordering::Acquire) {
            let written = self.storage.write_at(HostOffset::new(0), &self.text, Durability::Cached);
            written.map_err(io)?;
            self.is_described.store(true, Ordering::Release);
        }
        self.storage.sync().map_err(io)
    }

    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.has_failed.store(true, Ordering::Relaxed);
        }
        result
    }
}

impl Layer for Split {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, range: GuestRange, walk: &mut Walk<'_>) -> Result<Mapped> {
        for (extent, part) in self.parts(range) {
            let mapped = extent.map(part, walk)?;
            if mapped != Mapped::Complete {
                return Ok(mapped);
            }
            if walk.is_tired() && part.end() < range.end() {
                return Ok(Mapped::Partial);
            }
        }
        Ok(Mapped::Complete)
    }
}

impl WritableLayer for Split {
    fn capabilities(&self) -> Capabilities {
        self.extents.first().map_or_else(Capabilities::default, |extent| extent.capabilities())
    }

    fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()> {
        let start = offset.bytes();
        let written =
            self.parts(span(start, start + data.len() as u64)).try_for_each(|(extent, part)| {
                let data = &data[(part.offset().bytes() - start) as usize..];
                let data = &data[..part.length() as usize];
                extent.write_at(part.offset(), data, Durability::Cached)
            });
        self.noted(written)?;
        self.flush_if(durability)
    }

    fn try_write_at(&self, _: GuestOffset, _: &[u8]) -> Result<TryWrite> {
        Ok(TryWrite::WouldBlock)
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode, speed: Speed) -> Result<()> {
        let mut parts = self.parts(range);
        let zeroed = parts.try_for_each(|(extent, part)| extent.write_zeroes(part, mode, speed));
        match speed {
            Speed::Any => self.noted(zeroed),
            // It is an offer that may be declined.
            Speed::FastOnly => zeroed,
        }
    }

    fn discard(&self, _: GuestRange) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.noted(self.finish())
    }

    fn resize(&mut self, _: u64) -> Result<()> {
        let detail = "the size of a new image of this format cannot be changed";
        Err(Error::new(ErrorKind::Unsupported, "resize", detail))
    }
}

impl Drop for Split {
    fn drop(&mut self) {
        // A caller that has to know whether this works closes the image. One that lacks data must
        // not look complete.
        if !*self.has_failed.get_mut() && !*self.is_described.get_mut() {
            let _ = self.finish();
        }
    }
}

fn io(error: io::Error) -> Error {
    Error::from_io("write to", error)
}
