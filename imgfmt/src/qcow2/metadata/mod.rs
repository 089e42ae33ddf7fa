//! The header while the image is open, the marks in it, and the state of syncs.

pub(super) mod backing_change;
mod backing_format;
pub(super) mod changes;
pub(super) mod commits;
pub(super) mod failed_sync;
pub(super) mod header_edit;
pub(super) mod header_start;
pub(super) mod marks;
pub(super) mod metadata_file;
pub(super) mod seal;
