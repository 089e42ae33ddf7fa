//! [`ReadMap`]: the parts of a range of a disk, for a read of it.
//!
//! `imgfmt` has types of the same names for its images. These are the server's own, because an export
//! need not be an image: without the feature `image` there is no `imgfmt`.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;

/// Most parts of one map, and so most chunks of one reply.
const SEGMENTS_MAX: usize = 1024;
/// When so many parts are there already ...
const SEGMENTS_MANY: usize = SEGMENTS_MAX / 2;
/// ... shorter holes than this count as data, in bytes.
const HOLE_MIN: usize = 4096;

/// What is to be known of parts that read as zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Holes {
    /// They are told apart from data, as far as metadata knows of them.
    Told,
    /// They may pass for data: they are sent as bytes anyway.
    AsData,
}

/// Whether a map may be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lookup {
    /// Metadata may be read from the disk.
    MayRead,
    /// Only what is in memory is examined.
    CachedOnly,
}

/// What came of looking for the parts of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mapped {
    /// The map holds the whole range.
    Complete,
    /// The map holds the first part of the range, and not nothing. With [`Lookup::MayRead`] only.
    Partial,
    /// Metadata would have to be read first; the map is of no use. With [`Lookup::CachedOnly`] only.
    WouldBlock,
    /// As `WouldBlock`, but the system can tell what is missing without reading from the disk: it is
    /// work for a processor, of which the server does little at a time.
    HolesUnknown,
}

/// A part of a range.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Segment {
    /// Its length in bytes; not zero.
    pub length: usize,
    /// Where its bytes come from.
    pub content: Content,
}

/// Where the bytes of a part come from.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Content {
    /// They are zeroes.
    Zero,
    /// They are bytes of a file.
    File(FileSpan),
    /// They are these, read when the map was made: where one request finds out both what is zero
    /// and what is not. As many as the part is long.
    Bytes(Bytes),
    /// They are read with [`Export::read_at`](super::Export::read_at).
    Export,
}

/// A part of a file whose bytes are the bytes of the disk, and stay in that place forever.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FileSpan {
    /// The file.
    pub file: Arc<OwnedFd>,
    /// Where the bytes are in it, in bytes from its start.
    pub offset: u64,
}

impl FileSpan {
    /// The bytes of `file` from `offset` on, in bytes from its start.
    #[must_use]
    pub const fn new(file: Arc<OwnedFd>, offset: u64) -> Self {
        Self { file, offset }
    }
}

/// The parts of a range of a disk, in order and without gaps.
///
/// Parts that belong together are joined, and their number is bounded: where holes are many and
/// small they count as data.
#[derive(Debug, Default)]
pub struct ReadMap {
    segments: Vec<Segment>,
    length: usize,
    zero_len: usize,
}

impl ReadMap {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A map of `length` bytes that are read from the export.
    pub(crate) fn of_export(length: usize) -> Self {
        let mut map = Self::default();
        map.push_export(length);
        map
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.length = 0;
        self.zero_len = 0;
    }

    /// Appends `length` bytes that read as zero.
    pub fn push_zero(&mut self, length: usize) {
        if let Some(Segment { length: before, content: Content::Zero }) = self.segments.last_mut() {
            *before += length;
        } else if self.is_full() || self.is_crowded() && length < HOLE_MIN {
            return self.push_export(length);
        } else if length > 0 {
            self.segments.push(Segment { length, content: Content::Zero });
        }
        self.length += length;
        self.zero_len += length;
    }

    /// Appends `length` bytes that lie in a file.
    pub fn push_file(&mut self, length: usize, span: FileSpan) {
        if let Some(Segment { length: before, content: Content::File(last) }) =
            self.segments.last_mut()
            && Arc::ptr_eq(&last.file, &span.file)
            && last.offset + *before as u64 == span.offset
        {
            *before += length;
        } else if self.is_crowded() {
            return self.push_export(length);
        } else if length > 0 {
            self.segments.push(Segment { length, content: Content::File(span) });
        }
        self.length += length;
    }

    /// Appends bytes that have been read.
    pub fn push_bytes(&mut self, bytes: Bytes) {
        if self.is_full() {
            return self.push_export(bytes.len());
        }
        self.length += bytes.len();
        if !bytes.is_empty() {
            self.segments.push(Segment { length: bytes.len(), content: Content::Bytes(bytes) });
        }
    }

    /// Appends `length` bytes that are read from the export.
    pub fn push_export(&mut self, length: usize) {
        if let Some(Segment { length: before, content: Content::Export }) = self.segments.last_mut()
        {
            *before += length;
        } else if length > 0 {
            self.segments.push(Segment { length, content: Content::Export });
        }
        self.length += length;
    }

    /// The parts.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The length of the whole range, in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Whether the map is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// How many bytes of it are not known to be zero.
    #[must_use]
    pub const fn data_len(&self) -> usize {
        self.length - self.zero_len
    }

    fn is_crowded(&self) -> bool {
        self.segments.len() >= SEGMENTS_MANY
    }

    /// One more part would be too many, unless it takes everything that follows.
    fn is_full(&self) -> bool {
        self.segments.len() + 1 >= SEGMENTS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(map: &ReadMap) -> Vec<(usize, char)> {
        let kind = |content: &Content| match content {
            Content::Zero => 'z',
            Content::File(_) => 'f',
            Content::Bytes(_) => 'b',
            Content::Export => 'e',
        };
        map.segments().iter().map(|part| (part.length, kind(&part.content))).collect()
    }

    #[test]
    fn parts_that_belong_together_are_joined() {
        let file = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let span = |offset| FileSpan { file: Arc::clone(&file), offset };
        let mut map = ReadMap::new();
        map.push_zero(10);
        map.push_zero(0);
        map.push_zero(5);
        map.push_file(3, span(100));
        map.push_file(4, span(103));
        map.push_file(4, span(200));
        map.push_export(1);
        map.push_export(1);
        assert_eq!(kinds(&map), [(15, 'z'), (7, 'f'), (4, 'f'), (2, 'e')]);
        assert_eq!((map.len(), map.data_len()), (28, 13));
        map.clear();
        assert!(map.is_empty() && map.segments().is_empty());
    }

    #[test]
    fn many_small_holes_become_data_and_few_do_not() {
        let mut map = ReadMap::new();
        for _ in 0..10_000 {
            map.push_zero(512);
            map.push_export(512);
        }
        assert_eq!(map.len(), 10_000 * 1024);
        assert_eq!(map.segments().len(), SEGMENTS_MANY);
        assert_eq!(kinds(&map)[..4], [(512, 'z'), (512, 'e'), (512, 'z'), (512, 'e')]);
    }

    #[test]
    fn bytes_stand_for_themselves_until_there_are_too_many_parts() {
        let mut map = ReadMap::new();
        for number in 0..2 * SEGMENTS_MAX {
            map.push_bytes(Bytes::from(vec![number as u8; 3]));
            map.push_bytes(Bytes::new());
        }
        assert_eq!(map.len(), 6 * SEGMENTS_MAX);
        assert_eq!(map.segments().len(), SEGMENTS_MAX);
        let kinds = kinds(&map);
        assert_eq!(kinds[..2], [(3, 'b'), (3, 'b')]);
        assert!(matches!(kinds.last(), Some((_, 'e'))));
    }

    #[test]
    fn the_number_of_parts_is_bounded() {
        let file = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let mut map = ReadMap::new();
        for number in 0..10_000 {
            map.push_zero(1 << 16);
            map.push_file(10, FileSpan { file: Arc::clone(&file), offset: number * 1000 });
        }
        assert_eq!(map.len(), 10_000 * (10 + (1 << 16)));
        assert!(map.segments().len() <= SEGMENTS_MAX);
        assert!(matches!(map.segments().last().unwrap().content, Content::Export));
    }
}
