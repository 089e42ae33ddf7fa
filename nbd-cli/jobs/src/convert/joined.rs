//! Several disks, or parts of them, one after the other, as one.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use imgfmt::storage::StorageExtent;
use imgfmt::{
    ExtentKind, Format, GuestOffset, GuestRange, HostOffset, Image, OpenOptions, Storage,
};

use crate::error::{JobError, JobErrorKind};
use crate::image_location::ImageLocation;

/// The unit of disks, in bytes: the rest of the last one of each reads as zero.
const SECTOR: u64 = 512;

/// Returns the disks, of each this part, as one raw, read-only disk. Errors have the name of the
/// disk at fault.
///
/// # Errors
///
/// If they are too large together.
pub(super) fn join(
    images: Vec<(ImageLocation, Image)>,
    part: &Range<u64>,
) -> Result<Image, JobError> {
    let (mut parts, mut end) = (Vec::new(), 0_u64);
    for (location, image) in images {
        let (first, stop) = (part.start.min(image.size()), part.end.min(image.size()));
        let size = stop.saturating_sub(first);
        let length = size.checked_next_multiple_of(SECTOR);
        let next = length.and_then(|length| end.checked_add(length));
        let next = next.ok_or_else(|| JobError::invalid("the sources are too large together"))?;
        parts.push(Part { start: end, end: next, first, size, location, image });
        end = next;
    }
    let options = OpenOptions::new().format(Format::Raw);
    let joined = Image::from_storage(Arc::new(JoinedDisks { parts, end }), &options);
    joined.map_err(|error| JobError::source(error.to_string()))
}

#[derive(Debug)]
struct JoinedDisks {
    parts: Vec<Part>,
    end: u64,
}

#[derive(Debug)]
struct Part {
    start: u64,
    end: u64,
    /// Where it begins in the image, and its size there.
    first: u64,
    size: u64,
    location: ImageLocation,
    image: Image,
}

impl Part {
    fn failed(&self, error: imgfmt::Error) -> io::Error {
        io::Error::other(self.location.named(JobErrorKind::Source, error).to_string())
    }
}

impl JoinedDisks {
    fn part_at(&self, offset: u64) -> Option<&Part> {
        let next = self.parts.partition_point(|part| part.start <= offset);
        let part = self.parts.get(next.checked_sub(1)?)?;
        (offset < part.end).then_some(part)
    }
}

impl Storage for JoinedDisks {
    fn len(&self) -> io::Result<u64> {
        Ok(self.end)
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset.bytes() + done as u64;
            let Some(part) = self.part_at(at) else { break };
            let within = at - part.start;
            let count = (part.end - at).min((buffer.len() - done) as u64) as usize;
            let stored = part.size.saturating_sub(within).min(count as u64) as usize;
            let (data, rest) = buffer[done..][..count].split_at_mut(stored);
            let read = part.image.read_at(GuestOffset::new(part.first + within), data);
            read.map_err(|error| part.failed(error))?;
            rest.fill(0);
            done += count;
        }
        Ok(done)
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        let at = offset.bytes();
        let part = self.part_at(at).ok_or(io::ErrorKind::UnexpectedEof)?;
        let (within, length) = (at - part.start, length.min(part.end - at));
        let stored = part.size.saturating_sub(within).min(length);
        let range = GuestRange::new(GuestOffset::new(part.first + within), stored);
        let range = range.ok_or(io::ErrorKind::InvalidInput)?;
        let found = part.image.extents(range).bounded(1, 1).next().transpose();
        Ok(match found.map_err(|error| part.failed(error))? {
            Some(extent) => StorageExtent {
                length: extent.range.length(),
                kind: match extent.kind {
                    ExtentKind::Data => ExtentKind::Data,
                    _ => ExtentKind::Hole,
                },
            },
            // The rest of a sector.
            None => StorageExtent { length, kind: ExtentKind::Hole },
        })
    }

    fn is_known_data(&self, _: HostOffset, _: u64) -> bool {
        false
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
