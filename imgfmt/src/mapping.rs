//! Mappings: the kinds of the parts of a range of a disk, and the places of their bytes.
//!
//! A part of a disk is zero, or bytes of a file, or can only be read through the image. One walk
//! through the layers finds out which ([`Layer::map`](crate::layer::Layer::map)); reads, extents
//! and the maps that callers get are made from its results.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::extent::ExtentKind;
use crate::lease::Lease;
use crate::storage::Storage;
use crate::units::{GuestRange, HostOffset};

/// Whether a map or a read distinguishes the parts that read as zero according to metadata: parts
/// without content in any layer, zero clusters, and holes of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holes {
    /// They are distinguished from data.
    Told,
    /// They need not be: holes of files can be reported as data.
    AsData,
}

/// Whether a map may read metadata from a file, or ask the system for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lookup {
    /// It may, and so may block.
    MayRead,
    /// It uses metadata in memory only, and does not block.
    CachedOnly,
}

/// How far a map of a range goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub enum Mapped {
    /// To the end of the range.
    Complete,
    /// To the end of the last mapping that was passed on: the caller stopped, or the limit of
    /// examined metadata was reached.
    Partial,
    /// Like `Partial`, but because [`Lookup::CachedOnly`] forbids to look further.
    WouldBlock,
    /// Like `WouldBlock`, but only the holes of a file are missing, which the system can report
    /// without reading data.
    HolesUnknown,
}

/// A part of a disk that is of one kind throughout.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Mapping<'a> {
    /// The part of the disk; never empty.
    pub range: GuestRange,
    /// Where its bytes come from.
    pub content: Content<'a>,
    /// The layer that decides its content, as in [`Extent::depth`](crate::Extent::depth).
    pub depth: u32,
}

/// Where the bytes of a part of a disk come from.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Content<'a> {
    /// They are zeroes for which no space is allocated.
    Hole,
    /// They are zeroes for which space is allocated.
    Zero,
    /// They are stored contiguously in a storage.
    File(FileSpan<'a>),
    /// They are stored in another form: read them with [`Image::read_at`](crate::Image::read_at).
    Encoded(Encoded),
}

/// Bytes of a disk in a storage.
#[derive(Clone, Copy, Debug)]
pub struct FileSpan<'a> {
    /// The storage that holds them, usually a file whose descriptor [`Storage::as_fd`] returns.
    pub storage: &'a Arc<dyn Storage>,
    /// Their offset in the storage.
    pub offset: HostOffset,
    /// If true, the part past the end of the storage was never written and reads as zero. If false,
    /// a storage that ends too early is an error.
    pub(crate) may_pass_end: bool,
    /// Whether there may be holes that have not been looked for.
    pub(crate) may_have_holes: bool,
    /// Whether the file of the layer has these bytes at that offset. False if the storage decrypts
    /// them: then the file has other bytes, and may have them elsewhere.
    pub(crate) is_file_content: bool,
}

impl FileSpan<'_> {
    /// Returns whether the file of the layer has these very bytes at [`offset`](Self::offset): not
    /// if they are encrypted there.
    pub fn is_file_content(&self) -> bool {
        self.is_file_content
    }
}

/// The place of bytes in another form in the file of the layer that has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    pub(crate) offset: HostOffset,
    /// Upper bound of the length there, in bytes.
    pub(crate) length: u64,
    pub(crate) form: Form,
}

/// How bytes in a file differ from those of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Compressed,
    /// Encrypted, so that the key depends on places on the disk.
    #[cfg_attr(not(feature = "encryption"), expect(dead_code, reason = "nothing is decrypted"))]
    Encrypted,
}

impl Encoded {
    pub(crate) fn compressed(offset: HostOffset, length: u64) -> Self {
        Self { offset, length, form: Form::Compressed }
    }

    /// Returns whether the bytes are compressed. If not, they are encrypted.
    pub fn is_compressed(&self) -> bool {
        self.form == Form::Compressed
    }
}

impl Content<'_> {
    /// Returns the kind of an extent with this content.
    pub fn kind(&self) -> ExtentKind {
        match self {
            Self::Hole => ExtentKind::Hole,
            Self::Zero => ExtentKind::Zero,
            Self::File(_) | Self::Encoded(_) => ExtentKind::Data,
        }
    }

    /// Returns whether the bytes are zero according to metadata.
    pub fn is_zero(&self) -> bool {
        self.kind() != ExtentKind::Data
    }
}

/// The mappings of a range, which stay valid while this lives.
///
/// While a map lives, the places of its mappings are not reused for other parts of the disk. Writes
/// to the range itself remain visible there. Keep the map until the bytes have been transferred
/// (for sends without a copy, until they have left the socket's queue), and drop it soon after.
#[derive(Debug)]
pub struct ReadMap {
    // One of each for almost every short read: no allocation.
    parts: SmallVec<[MappedPart; 1]>,
    /// The storages of the parts; few, so each is listed once.
    storages: SmallVec<[Arc<dyn Storage>; 1]>,
    /// Dropped last: the storages are released before places are reused.
    _lease: Option<Lease>,
}

#[derive(Clone, Copy, Debug)]
struct MappedPart {
    range: GuestRange,
    source: Source,
    depth: u32,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Hole,
    Zero,
    File { storage: usize, offset: HostOffset, is_file_content: bool },
    Encoded(Encoded),
}

impl ReadMap {
    /// An empty map; its mappings stay valid while `lease` lives, or without one forever.
    pub(crate) fn new(lease: Option<Lease>) -> Self {
        Self { parts: SmallVec::new(), storages: SmallVec::new(), _lease: lease }
    }

    /// Returns the mappings in order of their offsets. Together they cover the requested range.
    pub fn mappings(&self) -> impl ExactSizeIterator<Item = Mapping<'_>> {
        self.parts.iter().map(|part| self.mapping_of(part))
    }

    /// Returns the mapping with this index among [all](Self::mappings), from 0 on; `None` after the
    /// last one.
    #[must_use]
    pub fn mapping(&self, index: usize) -> Option<Mapping<'_>> {
        Some(self.mapping_of(self.parts.get(index)?))
    }

    fn mapping_of(&self, part: &MappedPart) -> Mapping<'_> {
        let content = match part.source {
            Source::Hole => Content::Hole,
            Source::Zero => Content::Zero,
            Source::Encoded(encoded) => Content::Encoded(encoded),
            Source::File { storage, offset, is_file_content } => Content::File(FileSpan {
                storage: &self.storages[storage],
                offset,
                may_pass_end: false,
                may_have_holes: false,
                is_file_content,
            }),
        };
        Mapping { range: part.range, content, depth: part.depth }
    }

    /// Appends a mapping, joined to the last one if it continues that.
    pub(crate) fn push(&mut self, mapping: Mapping<'_>) {
        let source = match mapping.content {
            Content::Hole => Source::Hole,
            Content::Zero => Source::Zero,
            Content::Encoded(encoded) => Source::Encoded(encoded),
            Content::File(FileSpan { storage, offset, is_file_content, .. }) => {
                let known = self.storages.iter().position(|known| Arc::ptr_eq(known, storage));
                let storage = known.unwrap_or_else(|| {
                    self.storages.push(Arc::clone(storage));
                    self.storages.len() - 1
                });
                Source::File { storage, offset, is_file_content }
            }
        };
        let part = MappedPart { range: mapping.range, source, depth: mapping.depth };
        match self.parts.last_mut() {
            Some(last) if last.is_continued_by(&part) => {
                last.range = GuestRange::between(last.range.offset(), part.range.end())
                    .unwrap_or(last.range);
            }
            _ => self.parts.push(part),
        }
    }
}

impl MappedPart {
    fn is_continued_by(&self, next: &Self) -> bool {
        self.depth == next.depth
            && match (self.source, next.source) {
                (Source::Hole, Source::Hole) | (Source::Zero, Source::Zero) => true,
                (
                    Source::File { storage, offset, .. },
                    Source::File { storage: after, offset: continued, .. },
                ) => storage == after && offset.checked_add(self.range.length()) == Some(continued),
                _ => false,
            }
    }
}
