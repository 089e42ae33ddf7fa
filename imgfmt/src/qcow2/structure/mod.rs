//! Changes of a whole image: created, resized, with snapshots, amended.

pub(super) mod amend;
pub(super) mod create;
pub(super) mod resize;
pub(super) mod shrink;
pub(super) mod snapshot_change;
