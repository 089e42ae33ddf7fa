//! The content of a part of a disk, for a job that copies it.

use imgfmt::ExtentKind;
use nbd_client::Extent;
use nbd_proto::wire::AllocationFlags;

/// The treatment of a part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// It is read and written.
    Data,
    /// It is zero: it need not be read.
    Zero,
    /// The destination already has it.
    Unchanged,
}

/// Translates an extent of a file or an image.
pub(super) fn content_of(kind: ExtentKind) -> Content {
    match kind {
        ExtentKind::Data => Content::Data,
        ExtentKind::Hole | ExtentKind::Zero => Content::Zero,
    }
}

/// Translates an extent of `base:allocation`. A hole that does not read as zero may have any
/// content.
pub(super) fn allocated(extent: &Extent) -> Content {
    match extent.flags & AllocationFlags::STATE_ZERO.bits() {
        0 => Content::Data,
        _ => Content::Zero,
    }
}
