//! What an image needs in memory to be written, and the rules of its locks.
//!
//! Locks are taken in this order, and none is held while data is moved except the stripes:
//!
//! 1. stripes: one per guest cluster (several clusters share one). Whoever changes the mapping of a
//!    cluster holds its stripe from the lookup to the commit. Writes in place need none.
//! 2. `l1_change`: making or moving an L2 table.
//! 3. `commit_gate`: shared while a mapping is changed in memory, exclusive while a flush takes its
//!    copy of everything. So a copy holds each mapping with the refcounts it needs.
//! 4. the allocator, the tables, the lists below; each for a moment.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Mutex, RwLock};

/// The half of an image that only writing needs.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(in crate::qcow2) l1_change: Mutex<()>,
    /// L1 entries that are not yet on disk.
    pub(in crate::qcow2) dirty_l1: Mutex<BTreeSet<usize>>,
    /// Offsets of the L2 tables that the L1 table names.
    pub(in crate::qcow2) l2_places: RwLock<HashSet<u64>>,
}

impl Writer {
    pub(in crate::qcow2) fn new() -> Self {
        Self { l1_change: Mutex::new(()), dirty_l1: Mutex::default(), l2_places: RwLock::default() }
    }
}
