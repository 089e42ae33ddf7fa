//! [`PlacedRead`]: the places of a range that the server reads itself.

use std::os::fd::BorrowedFd;

/// The places of a range that is to be read. They stay valid until this is dropped: the server
/// drops it when the bytes have arrived.
pub trait PlacedRead: Send {
    /// Returns a part of the range, which has one or more, in order and without gaps; `None` after
    /// the last one. The first part has the index 0.
    fn part(&self, index: usize) -> Option<PlacedPart>;

    /// Returns the file of this number; `None` if there is none that can be read.
    fn file(&self, number: usize) -> Option<PlacedFile<'_>>;
}

/// A part of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlacedPart {
    /// Its length in bytes; not zero.
    pub length: usize,
    /// The place of its bytes.
    pub place: Placement,
}

impl PlacedPart {
    /// Creates a part of `length` bytes, at least one.
    #[must_use]
    pub const fn new(length: usize, place: Placement) -> Self {
        Self { length, place }
    }
}

/// The place of the bytes of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// The bytes are zeroes.
    Zero,
    /// In a file.
    File {
        /// Its [number](PlacedRead::file).
        number: usize,
        /// The offset in the file, in bytes.
        offset: u64,
    },
}

/// A file to read from.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct PlacedFile<'a> {
    /// Its descriptor.
    pub fd: BorrowedFd<'a>,
    /// Alignment that buffers in memory need, a power of two, in bytes; 1 for any.
    pub memory_alignment: usize,
    /// Alignment that offsets and lengths need, a power of two, in bytes; 1 for any.
    pub offset_alignment: u64,
}

impl<'a> PlacedFile<'a> {
    /// Creates a file that takes buffers, offsets and lengths of any alignment.
    #[must_use]
    pub const fn new(fd: BorrowedFd<'a>) -> Self {
        Self { fd, memory_alignment: 1, offset_alignment: 1 }
    }
}
