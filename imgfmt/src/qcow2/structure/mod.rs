//! Changes of a complete image: creating, resizing, snapshots, amending.

pub(super) mod amend;
pub(super) mod create;
pub(super) mod resize;
pub(super) mod shrink;
pub(super) mod snapshot_change;
