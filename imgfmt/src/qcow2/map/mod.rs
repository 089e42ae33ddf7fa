//! From guest offsets to clusters: the L1 table, cached L2 tables, extents.

pub(super) mod cache;
pub(super) mod extents;
pub(super) mod guard;
pub(super) mod lookup;
pub(super) mod tables;
