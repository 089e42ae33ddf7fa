//! What all formats have in common that divide the disk into blocks and find each by itself.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::file::{Cursor, ImageFile};
use super::foreign::{ForeignImage, Identity, Parent};
use crate::error::{Error, Result};
use crate::foreign_info::FormatDetails;
use crate::layer::{Backing, Layer, Walk};
use crate::mapping::{Content, Encoded, FileSpan, Lookup, Mapped};
use crate::units::{GuestOffset, GuestRange, HostOffset, span};

/// Most blocks that are passed on as one part: the walk has to see how far it got.
const JOINED_MAX: u32 = 4096;

/// What a format tells of an open image.
pub(super) trait Blocks: Send + Sync + fmt::Debug {
    /// The size of the disk in bytes.
    fn size(&self) -> u64;

    /// The file with the tables and the data.
    fn file(&self) -> &ImageFile;

    /// What there is from an offset of the disk on; the bytes lie in [`file`](Self::file). `None`
    /// if that would take waiting, and the cursor must not.
    fn find(&self, cursor: &mut Cursor<'_>, guest: u64) -> Result<Option<Piece>>;

    /// Decompresses all of the block at an offset of the disk, which `find` gave as encoded.
    fn decode(&self, _encoded: Encoded, guest: u64) -> Result<Arc<[u8]>> {
        Err(self.file().corrupt("the format has no compressed blocks", guest))
    }

    /// The length of blocks that are encoded, in bytes.
    fn encoded_block(&self) -> u64 {
        1
    }

    /// Whether space may have been set aside for blocks that were never written, so that holes of
    /// the file are zeroes.
    fn is_preallocated(&self) -> bool {
        false
    }

    /// What it says of the image below it.
    fn parent(&self) -> Option<&Parent> {
        None
    }

    /// What a child knows it by.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// The size of a block in bytes, if the format has blocks.
    fn block_size(&self) -> Option<u64>;

    /// What the image says of itself.
    fn details(&self) -> Option<FormatDetails> {
        None
    }
}

/// A part of a disk that is of one kind throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// How long it is, in bytes; at least 1. It may go beyond the end of the disk.
    pub(super) length: u64,
    pub(super) place: Place,
}

/// Where a part of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The image has nothing there: its parent shows, or zeroes.
    Absent,
    /// The image says that there are zeroes.
    Zero,
    /// From this offset of the file on.
    Stored(u64),
    /// In another form.
    Encoded(Encoded),
}

impl Piece {
    /// Whether `next` goes on where this one, of which `length` bytes are wanted, ends.
    fn is_continued_by(&self, length: u64, next: &Self) -> bool {
        match (self.place, next.place) {
            (Place::Absent, Place::Absent) | (Place::Zero, Place::Zero) => true,
            (Place::Stored(place), Place::Stored(next)) => place.checked_add(length) == Some(next),
            _ => false,
        }
    }
}

/// Where the pieces of a walk come from.
pub(super) struct Source<'s> {
    /// The layer that is asked.
    pub(super) layer: &'s dyn Layer,
    pub(super) file: &'s ImageFile,
    pub(super) backing: Option<&'s Backing>,
    /// As in [`Blocks`].
    pub(super) is_preallocated: bool,
}

impl Source<'_> {
    /// Pushes a range of the disk into the walk, piece by piece; neighbours that belong together at
    /// once.
    pub(super) fn map(
        &self,
        range: GuestRange,
        walk: &mut Walk<'_>,
        mut find: impl FnMut(u64) -> Result<Option<Piece>>,
    ) -> Result<Mapped> {
        let (mut position, end) = (range.offset().bytes(), range.end().bytes());
        let mut next = None;
        while position < end {
            let found = next.take().unwrap_or_else(|| find(position));
            let Some(piece) = found? else { return Ok(Mapped::WouldBlock) };
            walk.spend(1);
            let mut stop = position.saturating_add(piece.length.max(1)).min(end);
            let mut joined = 1;
            while stop < end && joined < JOINED_MAX {
                match find(stop) {
                    Ok(Some(following)) if piece.is_continued_by(stop - position, &following) => {
                        stop = stop.saturating_add(following.length.max(1)).min(end);
                    }
                    // What was found before an error can be used.
                    other => {
                        next = Some(other);
                        break;
                    }
                }
                walk.spend(1);
                joined += 1;
            }
            let mapped = self.push(span(position, stop), piece.place, walk)?;
            position = stop;
            if mapped != Mapped::Complete || walk.is_tired() && position < end {
                return Ok(if mapped == Mapped::Complete { Mapped::Partial } else { mapped });
            }
        }
        Ok(Mapped::Complete)
    }

    fn push(&self, range: GuestRange, place: Place, walk: &mut Walk<'_>) -> Result<Mapped> {
        match place {
            Place::Absent => Backing::map(self.backing, self.layer, range, walk),
            Place::Zero => walk.push(self.layer, range, Content::Hole),
            Place::Encoded(encoded) => walk.push(self.layer, range, Content::Encoded(encoded)),
            Place::Stored(offset) => {
                if !self.file.has(offset, range.length()) {
                    let detail = "the file ends before the data of this part of the disk: it was cut \
                                  off, or its tables are damaged";
                    return Err(self.file.corrupt(detail, range.offset().bytes()));
                }
                let file = FileSpan {
                    storage: self.file.storage(),
                    offset: HostOffset::new(offset),
                    may_pass_end: false,
                    may_have_holes: false,
                    is_file_content: true,
                };
                // The bytes are the disk's as they are: what is compressed has another place, and
                // of blocks with a bitmap only the sectors that count are here.
                match self.is_preallocated || walk.looks_into_blocks() {
                    true => walk.push_file(self.layer, range, file, Content::Zero),
                    false => walk.push(self.layer, range, Content::File(file)),
                }
            }
        }
    }
}

/// Whether nothing is found in a range; `None` if that would take waiting.
pub(super) fn lacks(
    range: GuestRange,
    mut find: impl FnMut(u64) -> Result<Option<Piece>>,
) -> Result<Option<bool>> {
    let (mut position, end) = (range.offset().bytes(), range.end().bytes());
    while position < end {
        let Some(piece) = find(position)? else { return Ok(None) };
        if piece.place != Place::Absent {
            return Ok(Some(false));
        }
        position = position.saturating_add(piece.length.max(1));
    }
    Ok(Some(true))
}

/// An image of a format with blocks.
#[derive(Debug)]
pub(super) struct BlockImage<B> {
    blocks: B,
    backing: Option<Backing>,
}

impl<B: Blocks + 'static> BlockImage<B> {
    pub(super) fn boxed(blocks: B) -> Box<dyn ForeignImage> {
        Box::new(Self { blocks, backing: None })
    }
}

impl<B: Blocks> Layer for BlockImage<B> {
    fn size(&self) -> u64 {
        self.blocks.size()
    }

    fn map(&self, range: GuestRange, walk: &mut Walk<'_>) -> Result<Mapped> {
        let file = self.blocks.file();
        let source = Source {
            layer: self,
            file,
            backing: self.backing.as_ref(),
            is_preallocated: self.blocks.is_preallocated(),
        };
        let mut cursor = Cursor::new(file, walk.lookup);
        source.map(range, walk, |guest| self.blocks.find(&mut cursor, guest))
    }

    fn decode(&self, encoded: Encoded, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let guest = offset.bytes();
        let block = self.blocks.decode(encoded, guest)?;
        // Pieces in other forms are not joined, so this lies in one block.
        let start = (guest % self.blocks.encoded_block()) as usize;
        let bytes = start.checked_add(buffer.len()).and_then(|end| block.get(start..end));
        let Some(bytes) = bytes else {
            return Err(self.blocks.file().corrupt("a compressed block is too short", guest));
        };
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn lacks(&self, range: GuestRange, lookup: Lookup) -> Result<Option<bool>> {
        let mut cursor = Cursor::new(self.blocks.file(), lookup);
        lacks(range, |guest| self.blocks.find(&mut cursor, guest))
    }

    fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    fn io_error(&self, operation: &'static str, error: io::Error, offset: GuestOffset) -> Error {
        self.blocks.file().io(operation, error, offset.bytes())
    }
}

impl<B: Blocks> ForeignImage for BlockImage<B> {
    fn parent(&self) -> Option<&Parent> {
        self.blocks.parent()
    }

    fn attach_parent(&mut self, parent: Arc<dyn Layer>) {
        self.backing = Some(Backing::new(parent));
    }

    fn identity(&self) -> Option<Identity> {
        self.blocks.identity()
    }

    fn block_size(&self) -> Option<u64> {
        self.blocks.block_size()
    }

    fn details(&self) -> Option<FormatDetails> {
        self.blocks.details()
    }
}
