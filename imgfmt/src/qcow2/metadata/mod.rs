//! The header while the image is open, marks in it, and the order of flushes.

pub(super) mod backing_change;
pub(super) mod failed_sync;
pub(super) mod flush;
pub(super) mod header_edit;
pub(super) mod marks;
pub(super) mod seal;
