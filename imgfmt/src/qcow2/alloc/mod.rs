//! Which clusters of the file are free, reserved, leased or waiting to be reused.

pub(super) mod allocator;
mod blocks;
pub(super) mod cluster_set;
pub(super) mod clusters;
pub(super) mod decompressed;
pub(super) mod place;
pub(super) mod preallocated;
