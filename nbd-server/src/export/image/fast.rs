//! The calls that make images fast as exports: requests that need no other thread, and maps of
//! reads.

use std::sync::Arc;

use imgfmt::{GuestOffset, Storage};

use super::{ImageExport, translate};
use crate::export::{
    Durability, ExportError, FastExport, FileSpan, Holes, Lookup, Mapped, MayBlock, Operation,
    PlacedFile, PlacedPart, PlacedRead, PlacedWrite, Placement, ReadMap, TryRead, TryWrite,
};

/// Longest write, in bytes, that is carried out on the connection's thread: a copy into the page
/// cache. A longer one would delay other connections of the thread.
const PROMPT_WRITE_LEN: usize = 2 << 20;

impl FastExport for ImageExport {
    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        let offset = GuestOffset::new(offset);
        let read = match holes {
            Holes::Told => self.image.try_read_data_at(offset, buffer),
            Holes::AsData => self.image.try_read_at(offset, buffer),
        };
        match read {
            Ok(imgfmt::TryRead::Complete) => Ok(TryRead::Complete),
            Ok(imgfmt::TryRead::WouldBlock) => Ok(TryRead::WouldBlock),
            Ok(imgfmt::TryRead::Sparse) => Ok(TryRead::Sparse),
            Err(error) => Err(translate(&error)),
        }
    }

    fn map_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        let range = Self::range(offset, length as u64)?;
        let lookup = match lookup {
            Lookup::MayRead => imgfmt::Lookup::MayRead,
            Lookup::CachedOnly => imgfmt::Lookup::CachedOnly,
        };
        let mapped = self.image.map(range, of_image(holes), lookup, |mapping| {
            // It is within a request, whose length is bounded.
            let length = mapping.range.length() as usize;
            match (mapping.content, &self.file) {
                (content, _) if content.is_zero() => map.push_zero(length),
                // Only the places of bytes of a raw file never change; others are read through the
                // image.
                (imgfmt::Content::File(span), Some(file)) => {
                    let span = FileSpan { file: Arc::clone(file), offset: span.offset.bytes() };
                    map.push_file(length, span);
                }
                _ => map.push_export(length),
            }
            true
        });
        match mapped.map_err(|error| translate(&error))? {
            imgfmt::Mapped::Complete => Ok(Mapped::Complete),
            imgfmt::Mapped::Partial => Ok(Mapped::Partial),
            imgfmt::Mapped::WouldBlock => Ok(Mapped::WouldBlock),
            imgfmt::Mapped::HolesUnknown => Ok(Mapped::HolesUnknown),
        }
    }

    fn place_read(&self, offset: u64, length: usize, holes: Holes) -> Option<Box<dyn PlacedRead>> {
        let range = Self::range(offset, length as u64).ok()?;
        let map = self.image.map_read_cached(range, of_image(holes)).ok()??;
        ImageRead::new(map).map(|read| Box::new(read) as _)
    }

    fn place_write(&self, offset: u64, length: usize) -> Option<Box<dyn PlacedWrite>> {
        // With the page cache, a write rarely waits, and needs no ring.
        self.image.direct_alignment()?;
        // Errors show when it is written through the image.
        let map = self.image.map_write(GuestOffset::new(offset), length as u64).ok()??;
        Some(Box::new(ImageWrite(map)))
    }

    fn may_block(&self, operation: Operation) -> MayBlock {
        if self.image.cache_mode().is_writethrough() {
            return MayBlock::Yes;
        }
        match operation {
            Operation::Write(length, Durability::Cached)
                if length <= PROMPT_WRITE_LEN && self.file.is_some() =>
            {
                MayBlock::No
            }
            // The system carries out one change of a file at a time; others would only wait for its
            // lock, and occupy threads.
            Operation::Write(_, Durability::Cached) if self.file.is_some() => MayBlock::Busy,
            Operation::Trim | Operation::WriteZeroes | Operation::Cache
                if self.image.path().is_some() =>
            {
                MayBlock::Busy
            }
            _ => MayBlock::Yes,
        }
    }

    fn is_writethrough(&self) -> bool {
        let cache = self.image.cache_mode();
        // In a mode without syncs, flushes do nothing.
        cache.is_writethrough() || !cache.syncs()
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        if data.len() > PROMPT_WRITE_LEN {
            return Ok(TryWrite::WouldBlock);
        }
        match self.image.try_write_at(GuestOffset::new(offset), data) {
            Ok(imgfmt::TryWrite::Complete) => Ok(TryWrite::Complete),
            Ok(imgfmt::TryWrite::WouldBlock) => Ok(TryWrite::WouldBlock),
            Err(error) => Err(translate(&error)),
        }
    }
}

/// A range of an image: its mappings, which stay valid while this lives.
struct ImageRead(imgfmt::ReadMap);

impl ImageRead {
    /// `None` if some of the bytes are not stored unencoded in a file.
    fn new(map: imgfmt::ReadMap) -> Option<Self> {
        let is_placed = |mapping: imgfmt::Mapping<'_>| match mapping.content {
            imgfmt::Content::File(span) => span.storage.read_fd().is_some(),
            content => content.is_zero(),
        };
        let is_placed = map.mappings().all(is_placed);
        is_placed.then_some(Self(map))
    }
}

impl PlacedRead for ImageRead {
    fn part(&self, index: usize) -> Option<PlacedPart> {
        let mapping = self.0.mapping(index)?;
        let place = match mapping.content {
            // A file has the number of the part.
            imgfmt::Content::File(span) => {
                Placement::File { number: index, offset: span.offset.bytes() }
            }
            _ => Placement::Zero,
        };
        Some(PlacedPart { length: mapping.range.length() as usize, place })
    }

    fn file(&self, number: usize) -> Option<PlacedFile<'_>> {
        match self.0.mapping(number)?.content {
            imgfmt::Content::File(span) => placed_file(&**span.storage),
            _ => None,
        }
    }
}

/// A write to an image.
struct ImageWrite(imgfmt::WriteMap);

impl PlacedWrite for ImageWrite {
    fn file(&self) -> Option<PlacedFile<'_>> {
        placed_file(&**self.0.storage())
    }

    fn offset(&self) -> u64 {
        self.0.offset().bytes()
    }

    fn is_durable_alone(&self) -> bool {
        self.0.is_durable_alone()
    }

    fn failed(self: Box<Self>, error: &std::io::Error) {
        self.0.failed(error);
    }

    fn written(self: Box<Self>) -> Result<(), ExportError> {
        self.0.written();
        Ok(())
    }
}

fn placed_file(storage: &dyn Storage) -> Option<PlacedFile<'_>> {
    let (memory, offset) = storage
        .direct_alignment()
        .map_or((1, 1), |alignment| (alignment.memory as usize, u64::from(alignment.offset)));
    let fd = storage.read_fd()?;
    Some(PlacedFile { fd, memory_alignment: memory, offset_alignment: offset })
}

const fn of_image(holes: Holes) -> imgfmt::Holes {
    match holes {
        Holes::Told => imgfmt::Holes::Told,
        Holes::AsData => imgfmt::Holes::AsData,
    }
}
