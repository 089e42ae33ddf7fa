//! From guest offsets to clusters: the L1 table, cached L2 tables.

pub(super) mod cache;
pub(super) mod guard;
pub(super) mod lookup;
pub(super) mod mapping_tables;
pub(super) mod table;
pub(super) mod tables;
