//! The sidecar: a file beside an image from which dirty bitmaps are recovered after a crash.
//!
//! It holds all bits of the enabled bitmaps, mapped into memory ([`map`]), and an [activity
//! log](log) of the extents of the disk that are being written. A bit is set before its write is
//! submitted. If the process dies, the kernel still has the bits. If the machine dies, bits that
//! did not reach the disk belong to extents that the log on disk names, and [recovery](recover)
//! marks these extents completely.
//!
//! A file belongs to one *epoch*: its bits are only set, never cleared. Every other change of
//! bitmaps (clearing, adding, merging) creates a new file that replaces the old one.
//!
//! This module is independent of formats and trackers. `DESIGN.md` documents the [`layout`].

mod clock;
mod file;
mod layout;
mod location;
mod lock;
mod log;
mod map;
mod open;
#[cfg(any(test, feature = "test-util"))]
mod recorded;
mod recover;

use crate::access::BitmapDurability;

pub(crate) use file::SidecarPlace;
pub(crate) use layout::{BitmapDescriptor, Description, Fingerprint, Identity};
pub(crate) use location::{FoundBytes, SidecarLocation};
pub(crate) use open::{InFlight, Sidecar};
pub(crate) use recover::{Recovery, Rejection, Trust};

/// The precision of recovered bitmaps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecoveryPrecision {
    /// Exact: only the ranges that were about to be written are marked.
    #[default]
    Exact,
    /// The machine was restarted: the parts of the disk that were being written, usually of 4 MiB
    /// each, are marked completely.
    WholeExtents,
}

/// The durability of the dirty bitmaps of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapDurabilityStatus {
    /// The failures that they survive.
    pub durability: BitmapDurability,
    /// The reason why that is less than requested, as a clause.
    pub degraded: Option<String>,
    /// The bitmaps that were recovered from a crash when the image was opened.
    pub recovered: Vec<String>,
    /// The bitmaps into which bits of an interrupted checkpoint
    /// ([frozen](crate::BitmapChange::Freeze) bits) were merged back when the image was opened.
    pub thawed: Vec<String>,
    /// The reason why bits could not be merged back, as a clause: the bitmaps that lack them report
    /// it.
    pub thaw_failure: Option<String>,
    /// The precision of the recovered bits.
    pub precision: RecoveryPrecision,
}

#[cfg(test)]
mod tests;
