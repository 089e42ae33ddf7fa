//! Dirty bitmaps: the parts of a disk that have changed since a point in time.
//!
//! [`bits`] is one bitmap in memory. [`tracker`] holds the bitmaps of one open image; every change of
//! the disk passes through it. The image format defines how bitmaps are stored.

mod bits;
mod tracker;

use crate::backup::{BeganAfter, Uuid};
use crate::units::GuestRange;

pub use bits::DirtyBits;
pub(crate) use bits::{Bits, GRANULARITY_BITS_MAX, GRANULARITY_BITS_MIN};
pub(crate) use tracker::{Bitmap, Condition, ExclusiveState, Recorded, State, Tracker, WouldBlock};

/// The granularity of a bitmap for which none is asked for, in bytes.
pub const BITMAP_GRANULARITY_DEFAULT: u64 = 64 << 10;

/// The longest name of a bitmap, in bytes.
pub const BITMAP_NAME_BYTES_MAX: usize = 1023;

/// Whether a bitmap notes changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Recording {
    /// Every change of the disk sets its bits.
    #[default]
    Enabled,
    /// It stays as it is.
    Disabled,
}

/// Whether the bits of a bitmap can be relied on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapState {
    /// Yes.
    Consistent {
        /// How many bytes of the disk are marked as changed.
        dirty_bytes: u64,
    },
    /// No: whoever wrote the image last did not close it properly. It can be removed, or repaired
    /// into a bitmap in which everything is dirty.
    Inconsistent {
        /// Why, as a clause.
        reason: String,
    },
    /// No: what the image says about it is damaged. It can be removed, or repaired as above.
    Damaged {
        /// In which way, as a clause.
        reason: String,
    },
    /// No: a checkpoint has moved bits of it to another bitmap ([`BitmapChange::Freeze`]), and they are
    /// not back. Opening the image for writing puts them back, unless they cannot be relied on.
    Incomplete {
        /// The name of the bitmap that holds them.
        frozen: String,
        /// Why they cannot be relied on, as a clause, if they cannot. When that bitmap is repaired,
        /// everything is dirty in it.
        problem: Option<String>,
    },
}

impl BitmapState {
    /// Why the bits cannot be relied on, as a clause; `None` if they can.
    pub fn problem(&self) -> Option<String> {
        match self {
            Self::Consistent { .. } => None,
            Self::Inconsistent { reason } | Self::Damaged { reason } => Some(reason.clone()),
            Self::Incomplete { frozen, problem: None } => {
                Some(format!("a checkpoint has moved bits of it to '{frozen}'"))
            }
            Self::Incomplete { frozen, problem: Some(problem) } => Some(format!(
                "a checkpoint has moved bits of it to '{frozen}', and those cannot be relied on: \
                 {problem}"
            )),
        }
    }
}

/// What is known about a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// How many bytes of the disk one bit stands for; a power of two.
    pub granularity: u64,
    /// Whether it notes changes.
    pub recording: Recording,
    /// The image says that the bitmap is in use: what is stored is out of date. Normal while the
    /// image is open and has been written to.
    pub is_in_use: bool,
    /// Whether its bits can be relied on.
    pub state: BitmapState,
    /// The backup after which it began: what is dirty in it has changed since.
    pub began_after: BeganAfter,
}

/// One step of a change of an image's bitmaps.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum BitmapChange {
    /// A new bitmap, in which nothing is dirty.
    Add {
        /// Its name, 1 to 1023 bytes.
        name: String,
        /// How many bytes one bit stands for: a power of two from 512 to 2 GiB.
        granularity: u64,
        /// Whether it notes changes from now on.
        recording: Recording,
    },
    /// The bitmap is no more. This is possible in any state.
    Remove {
        /// Its name.
        name: String,
    },
    /// Nothing is dirty any more.
    Clear {
        /// Its name.
        name: String,
    },
    /// It notes changes from now on.
    Enable {
        /// Its name.
        name: String,
    },
    /// It stays as it is from now on.
    Disable {
        /// Its name.
        name: String,
    },
    /// What is dirty in one bitmap becomes dirty in the other too.
    Merge {
        /// The name of the one that changes.
        into: String,
        /// The name of the one that stays.
        from: String,
    },
    /// As `Merge`, from a bitmap of any image.
    MergeBits {
        /// The name of the one that changes.
        into: String,
        /// What is to be added.
        from: DirtyBits,
    },
    /// Everything is dirty.
    MarkAll {
        /// Its name.
        name: String,
    },
    /// The beginning of a checkpoint: the bits of a bitmap move to another one, called
    /// [`frozen_bitmap_name`](crate::frozen_bitmap_name), and it begins anew. Until they are
    /// dropped or thawed it is [incomplete](BitmapState::Incomplete). Bits that are frozen already
    /// go with them.
    Freeze {
        /// Its name.
        name: String,
        /// The backup that is to be made of what it was: when the frozen bits are dropped the bitmap
        /// [began after](BitmapInfo::began_after) it.
        backup: Option<Uuid>,
    },
    /// A checkpoint has failed: frozen bits are merged back. Opening an image for writing does the
    /// same for all its bitmaps.
    Thaw {
        /// The name of the bitmap whose bits they were.
        name: String,
    },
    /// A checkpoint has succeeded: what frozen bits stand for is backed up, and they are given up.
    DropFrozen {
        /// The name of the bitmap whose bits they were.
        name: String,
    },
    /// A bitmap whose bits cannot be relied on becomes one in which everything is dirty.
    Repair {
        /// Its name.
        name: String,
    },
}

/// A part of a disk that is dirty or clean throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyExtent {
    /// Where it is; never empty.
    pub range: GuestRange,
    /// Whether it may have changed.
    pub is_dirty: bool,
}
