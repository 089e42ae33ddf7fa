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
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, RwLock};

/// The half of an image that only writing needs.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(in crate::qcow2) l1_change: Mutex<()>,
    pub(in crate::qcow2) commit_gate: RwLock<()>,
    /// L1 entries that are not yet on disk.
    pub(in crate::qcow2) dirty_l1: Mutex<BTreeSet<usize>>,
    /// Offsets of the L2 tables that the L1 table names.
    pub(in crate::qcow2) l2_places: RwLock<HashSet<u64>>,
    pub(in crate::qcow2) flush: Mutex<()>,
    /// Counts calls of flush, and up to which call everything is on disk.
    pub(in crate::qcow2) flush_calls: AtomicU64,
    pub(in crate::qcow2) flush_covers: AtomicU64,
}

impl Writer {
    pub(in crate::qcow2) fn new() -> Self {
        Self {
            l1_change: Mutex::new(()),
            commit_gate: RwLock::new(()),
            dirty_l1: Mutex::default(),
            l2_places: RwLock::default(),
            flush: Mutex::new(()),
            flush_calls: AtomicU64::new(0),
            flush_covers: AtomicU64::new(0),
        }
    }
}
