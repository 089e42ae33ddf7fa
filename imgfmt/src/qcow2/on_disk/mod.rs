//! The format's structures: header, extensions, entries, refcounts, snapshots.

pub(super) mod cluster;
pub(super) mod contradiction;
pub(super) mod extension;
pub(super) mod geometry;
pub(super) mod header;
pub(super) mod incomplete;
pub(super) mod l2;
pub(super) mod refcount;
pub(super) mod refcount_entry;
pub(super) mod snapshot;
pub(super) mod words;
