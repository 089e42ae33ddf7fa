//! Where a frame is.

use super::id::PackId;
use super::reader::Reader;
use super::seal::{FramePlace, Hash};

/// Longest pack that is read, in bytes.
pub(crate) const PACK_BYTES_MAX: u32 = 64 << 20;

/// Where a frame is, and the hash of its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) pack: PackId,
    /// Offset in the pack, in bytes.
    pub(crate) offset: u32,
    /// Length of the frame, in bytes.
    pub(crate) length: u32,
    pub(crate) hash: Hash,
}

impl Stored {
    /// The bytes of the pack that hold the frame.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.offset);
        start..start + u64::from(self.length)
    }

    /// The place to which encryption binds the frame.
    pub(crate) fn place(&self) -> FramePlace {
        FramePlace::in_pack(self.pack, self.offset)
    }
}

/// Reads where a frame of at most `longest` bytes is.
pub(crate) fn stored(reader: &mut Reader<'_>, pack: PackId, longest: u32) -> Option<Stored> {
    let (offset, length) = (reader.u32()?, reader.u32()?);
    let hash = Hash(reader.array()?);
    let is_inside = offset.checked_add(length)? <= PACK_BYTES_MAX;
    let is_possible = (1..=longest).contains(&length) && is_inside;
    is_possible.then_some(Stored { pack, offset, length, hash })
}

/// Appends a number as 32 bits. Counts are bounded by what was counted.
pub(crate) fn push(bytes: &mut Vec<u8>, number: usize) {
    bytes.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
}
