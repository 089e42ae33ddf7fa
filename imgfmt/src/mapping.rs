//! Mappings: what the parts of a range of a disk are, and where their bytes lie.
//!
//! There is one question, "zero, these bytes of that file, or read it through the image?", and one walk
//! through the layers that answers it ([`Layer::map`](crate::layer::Layer::map)). Reads, extents and the
//! maps that callers get are made of its answers.

use std::sync::Arc;

use crate::extent::ExtentKind;
use crate::lease::Lease;
use crate::storage::Storage;
use crate::units::{GuestRange, HostOffset};

/// What a map or a read makes of parts of which metadata knows that they read as zero: those that
/// no layer has, zero clusters, and holes of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holes {
    /// They are told apart from data.
    Told,
    /// They need not be: holes of files are bytes like any other.
    AsData,
}

/// Whether a map may read metadata from a file, or ask the system for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lookup {
    /// It may, and so may have to wait.
    MayRead,
    /// It uses what is in memory.
    CachedOnly,
}

/// How far a map of a range goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub enum Mapped {
    /// To the end of the range.
    Complete,
    /// To the end of the last mapping that was passed on: no more was wanted, or enough was examined.
    Partial,
    /// As with `Partial`; with [`Lookup::CachedOnly`] more cannot be told.
    WouldBlock,
    /// As with `WouldBlock`, but only the holes of a file are missing: the system tells them without
    /// reading data.
    HolesUnknown,
}

/// A part of a disk that is of one kind throughout.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Mapping<'a> {
    /// Which part of the disk this is; never empty.
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
    /// They lie in one piece in a storage.
    File(FileSpan<'a>),
    /// They are stored in another form: read them with [`Image::read_at`](crate::Image::read_at).
    Encoded(Encoded),
}

/// Bytes of a disk in a storage.
#[derive(Clone, Copy, Debug)]
pub struct FileSpan<'a> {
    /// The storage that holds them, most often a file whose descriptor [`Storage::as_fd`] gives.
    pub storage: &'a Arc<dyn Storage>,
    /// Where in the storage they start.
    pub offset: HostOffset,
    /// What lies past the end of the storage was never written and reads as zero. Otherwise the
    /// storage has become shorter than the disk, which is an error.
    pub(crate) may_pass_end: bool,
    /// There may be holes that have not been looked for.
    pub(crate) may_have_holes: bool,
}

/// The place of bytes in another form in the file of the layer that has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    pub(crate) offset: HostOffset,
    /// Upper bound of the length there, in bytes.
    pub(crate) length: u64,
}

impl Content<'_> {
    /// What an extent says of it.
    pub fn kind(&self) -> ExtentKind {
        match self {
            Self::Hole => ExtentKind::Hole,
            Self::Zero => ExtentKind::Zero,
            Self::File(_) | Self::Encoded(_) => ExtentKind::Data,
        }
    }

    /// Whether metadata says that they are zeroes.
    pub fn is_zero(&self) -> bool {
        self.kind() != ExtentKind::Data
    }
}

/// The mappings of a range and the promise that they stay true.
///
/// While a map lives, the places that its mappings name are not given to other parts of the disk.
/// Writes to the range itself still show. Keep it until the bytes have been moved, also out of a
/// socket's queue if they were sent without a copy, and drop it soon after.
#[derive(Debug)]
pub struct ReadMap {
    parts: Vec<MappedPart>,
    /// The storages that parts name; few, so each is counted once.
    storages: Vec<Arc<dyn Storage>>,
    /// Dropped last: the storages are let go before places are given away.
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
    File { storage: usize, offset: HostOffset },
    Encoded(Encoded),
}

impl ReadMap {
    /// An empty map; what it gets stays true while `lease` lives, or forever.
    pub(crate) fn new(lease: Option<Lease>) -> Self {
        Self { parts: Vec::new(), storages: Vec::new(), _lease: lease }
    }

    /// The mappings in order of their offsets; together they cover the range that was asked for.
    pub fn mappings(&self) -> impl ExactSizeIterator<Item = Mapping<'_>> {
        self.parts.iter().map(|part| {
            let content = match part.source {
                Source::Hole => Content::Hole,
                Source::Zero => Content::Zero,
                Source::Encoded(encoded) => Content::Encoded(encoded),
                Source::File { storage, offset } => Content::File(FileSpan {
                    storage: &self.storages[storage],
                    offset,
                    may_pass_end: false,
                    may_have_holes: false,
                }),
            };
            Mapping { range: part.range, content, depth: part.depth }
        })
    }

    /// Appends a mapping, joined to the last one if it continues that.
    pub(crate) fn push(&mut self, mapping: Mapping<'_>) {
        let source = match mapping.content {
            Content::Hole => Source::Hole,
            Content::Zero => Source::Zero,
            Content::Encoded(encoded) => Source::Encoded(encoded),
            Content::File(FileSpan { storage, offset, .. }) => {
                let known = self.storages.iter().position(|known| Arc::ptr_eq(known, storage));
                let storage = known.unwrap_or_else(|| {
                    self.storages.push(Arc::clone(storage));
                    self.storages.len() - 1
                });
                Source::File { storage, offset }
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
                    Source::File { storage, offset },
                    Source::File { storage: after, offset: continued },
                ) => storage == after && offset.checked_add(self.range.length()) == Some(continued),
                _ => false,
            }
    }
}
