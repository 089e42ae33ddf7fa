//! Dirty bitmaps: the parts of a disk that have changed since a point in time.
//!
//! [`bits`] is one bitmap in memory. [`tracker`] holds the bitmaps of one open image; every change
//! of the disk passes through it. The image format defines how bitmaps are stored.

mod bits;
mod elsewhere;
mod tracker;

use crate::backup::{BeganAfter, Uuid};
use crate::units::GuestRange;

pub use bits::DirtyBits;
pub(crate) use bits::{Bits, GRANULARITY_BITS_MAX, GRANULARITY_BITS_MIN};
pub(crate) use tracker::{
    Bitmap, Condition, ExclusiveState, Recorded, RecordedElsewhere, State, Tracker, WouldBlock,
};

/// Default granularity of a bitmap, in bytes.
pub const BITMAP_GRANULARITY_DEFAULT: u64 = 64 << 10;

/// The longest name of a bitmap, in bytes.
pub const BITMAP_NAME_BYTES_MAX: usize = 1023;

/// Whether a bitmap records changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Recording {
    /// Every change of the disk sets its bits.
    #[default]
    Enabled,
    /// The bitmap does not change.
    Disabled,
}

/// Whether the bits of a bitmap are reliable.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapState {
    /// The bits are reliable.
    Consistent {
        /// Bytes of the disk that are marked as changed.
        dirty_bytes: u64,
    },
    /// Unreliable: the last writer of the image did not close it properly. The bitmap can be
    /// removed, or repaired; a repair marks everything as dirty.
    Inconsistent {
        /// The reason, as a clause.
        reason: String,
    },
    /// Unreliable: the bitmap's metadata is damaged. It can be removed, or repaired as above.
    Damaged {
        /// The damage, as a clause.
        reason: String,
    },
    /// Unreliable: a checkpoint has moved bits to another bitmap ([`BitmapChange::Freeze`]) and has
    /// not ended. Opening the image for writing merges them back, unless they are unreliable
    /// themselves.
    Incomplete {
        /// The name of the bitmap that holds them.
        frozen: String,
        /// The reason why the moved bits are unreliable, as a clause, if they are. A repair of the
        /// other bitmap marks everything in it as dirty.
        problem: Option<String>,
    },
}

impl BitmapState {
    /// Returns the reason why the bits are unreliable, as a clause; `None` if they are reliable.
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

/// The properties of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk per bit; a power of two.
    pub granularity: u64,
    /// Whether it records changes.
    pub recording: Recording,
    /// Whether the bitmap is marked as in use: its stored bits are out of date. This is normal
    /// while an image is open and has been written to.
    pub is_in_use: bool,
    /// Whether its bits are reliable.
    pub state: BitmapState,
    /// The backup after which it started: its dirty ranges have changed since.
    pub began_after: BeganAfter,
}

/// One step of a change of an image's bitmaps.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum BitmapChange {
    /// Add an empty bitmap.
    Add {
        /// Its name, 1 to 1023 bytes.
        name: String,
        /// Bytes per bit: a power of two from 512 to 2 GiB.
        granularity: u64,
        /// Whether it records changes from now on.
        recording: Recording,
    },
    /// Remove a bitmap, in any state.
    Remove {
        /// Its name.
        name: String,
    },
    /// Clear all bits.
    Clear {
        /// Its name.
        name: String,
    },
    /// Record changes from now on.
    Enable {
        /// Its name.
        name: String,
    },
    /// Do not record changes from now on.
    Disable {
        /// Its name.
        name: String,
    },
    /// Add the dirty ranges of one bitmap to another.
    Merge {
        /// The name of the bitmap that is changed.
        into: String,
        /// The name of the bitmap that is read.
        from: String,
    },
    /// Add dirty ranges that were read from a bitmap of any image.
    MergeBits {
        /// The name of the bitmap that is changed.
        into: String,
        /// The bits to be added.
        from: DirtyBits,
    },
    /// Set all bits.
    MarkAll {
        /// Its name.
        name: String,
    },
    /// Start a checkpoint: the bits of a bitmap move to another one, called
    /// [`frozen_bitmap_name`](crate::frozen_bitmap_name), and the bitmap restarts empty. Until they
    /// are dropped or thawed, it is [incomplete](BitmapState::Incomplete). Bits that were frozen
    /// earlier stay frozen, and these are added to them.
    Freeze {
        /// Its name.
        name: String,
        /// The backup to be made of its earlier state: when the frozen bits are dropped, the bitmap
        /// has [started after](BitmapInfo::began_after) it.
        backup: Option<Uuid>,
    },
    /// Merge frozen bits back, after a failed checkpoint. Opening an image for writing does the
    /// same for all its bitmaps.
    Thaw {
        /// The name of the bitmap to which the bits belong.
        name: String,
    },
    /// Drop frozen bits, after a successful checkpoint: their ranges are backed up.
    DropFrozen {
        /// The name of the bitmap to which the bits belong.
        name: String,
    },
    /// Make an unreliable bitmap one in which everything is dirty.
    Repair {
        /// Its name.
        name: String,
    },
}

/// A range of a disk that is dirty or clean throughout.
///
/// This plain value has these two fields and will have no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyExtent {
    /// The range; never empty.
    pub range: GuestRange,
    /// Whether it may have changed.
    pub is_dirty: bool,
}
