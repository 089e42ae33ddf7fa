//! Maps guest offsets to clusters: the L1 table, and cached L2 tables.

pub(super) mod below;
pub(super) mod cache;
pub(super) mod guard;
pub(super) mod in_place;
pub(super) mod load;
pub(super) mod lookup;
pub(super) mod mapping_tables;
pub(super) mod slices;
pub(super) mod table;
pub(super) mod tables;
