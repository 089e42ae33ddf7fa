//! What a part of a disk holds, for a job that copies it.

use imgfmt::ExtentKind;
use nbd_client::Extent;
use nbd_proto::wire::AllocationFlags;

/// What becomes of a part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// It is read and written.
    Data,
    /// It is zero: it need not be read.
    Zero,
    /// The destination has it already.
    Unchanged,
}

/// What an extent of a file or an image means.
pub(super) fn content_of(kind: ExtentKind) -> Content {
    match kind {
        ExtentKind::Data => Content::Data,
        ExtentKind::Hole | ExtentKind::Zero => Content::Zero,
    }
}

/// What an extent of `base:allocation` means. A hole that does not read as zero may hold anything.
pub(super) fn allocated(extent: &Extent) -> Content {
    match extent.flags & AllocationFlags::STATE_ZERO.bits() {
        0 => Content::Data,
        _ => Content::Zero,
    }
}
