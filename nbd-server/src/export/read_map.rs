//! [`ReadMap`]: the parts of a range of a disk, for a read of it.
//!
//! `imgfmt` has types of the same names for its images. This crate has its own, because without the
//! feature `image` it does not depend on `imgfmt`.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;

/// Most parts of one map, and so most chunks of one reply.
const SEGMENTS_MAX: usize = 1024;
/// If there are this many parts already ...
const SEGMENTS_MANY: usize = SEGMENTS_MAX / 2;
/// ... shorter holes than this count as data, in bytes.
const HOLE_MIN: usize = 4096;

/// Whether a map distinguishes parts that read as zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Holes {
    /// They are distinguished from data, as far as metadata shows them.
    Told,
    /// They may count as data: they are sent as bytes in any case.
    AsData,
}

/// Whether mapping may block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lookup {
    /// Metadata may be read from the disk.
    MayRead,
    /// Only metadata in memory is examined, without blocking.
    CachedOnly,
}

/// The result of mapping a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mapped {
    /// The map contains the complete range.
    Complete,
    /// The map contains the first part of the range, which is not empty. Only with
    /// [`Lookup::MayRead`].
    Partial,
    /// Metadata would have to be read first; the map is unusable. Only with [`Lookup::CachedOnly`].
    WouldBlock,
    /// Like `WouldBlock`, but the system can find the missing part without reading from the disk.
    /// That takes processor time, so the server runs few such calls at a time.
    HolesUnknown,
}

/// A part of a range.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Segment {
    /// Its length in bytes; not zero.
    pub length: usize,
    /// The source of its bytes.
    pub content: Content,
}

/// The source of the bytes of a part.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Content {
    /// Zeroes.
    Zero,
    /// Bytes of a file.
    File(FileSpan),
    /// These bytes, which were read with the map: for an export whose reads also find zeroes. Their
    /// number is the part's length.
    Bytes(Bytes),
    /// Bytes to be read with [`Export::read_at`](super::Export::read_at).
    Export,
}

/// A part of a file whose bytes are the bytes of the disk, and stay in that place while the export
/// exists.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FileSpan {
    /// The file.
    pub file: Arc<OwnedFd>,
    /// The offset in the file, in bytes.
    pub offset: u64,
}

impl FileSpan {
    /// Creates a span that begins at `offset` of `file`, in bytes.
    #[must_use]
    pub const fn new(file: Arc<OwnedFd>, offset: u64) -> Self {
        Self { file, offset }
    }
}

/// The parts of a range of a disk, in order and without gaps.
///
/// Adjacent parts of one kind are joined, and their number is bounded: if there are many small
/// holes, they count as data.
#[derive(Debug, Default)]
pub struct ReadMap {
    segments: Vec<Segment>,
    length: usize,
    zero_len: usize,
}

impl ReadMap {
    /// Creates an empty map.
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

    /// Appends `length` bytes that are in a file.
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

    /// Returns the parts, in order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Returns the length of the complete range, in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Returns whether the map is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Returns the number of bytes that are not known to be zero.
    #[must_use]
    pub const fn data_len(&self) -> usize {
        self.length - self.zero_len
    }

    fn is_crowded(&self) -> bool {
        self.segments.len() >= SEGMENTS_MANY
    }

    /// Whether the next part must take everything that follows.
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
