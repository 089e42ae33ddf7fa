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
use std::sync::atomic::{AtomicU64, Ordering::AcqRel, Ordering::Acquire};
use std::sync::{Mutex, MutexGuard, RwLock};

use crate::error::Result;
use crate::qcow2::alloc::allocator::{Allocator, Freed, Quarantine, Reserved};
use crate::qcow2::alloc::lease::Leases;
use crate::qcow2::lock::{lock, try_lock};
use crate::qcow2::map::lookup::Lookup;
use crate::qcow2::{Qcow2, unwritable};

const STRIPES: u64 = 256;

/// The half of an image that only writing needs.
#[derive(Debug)]
pub(crate) struct Writer {
    stripes: Vec<Mutex<()>>,
    pub(in crate::qcow2) l1_change: Mutex<()>,
    pub(in crate::qcow2) commit_gate: RwLock<()>,
    pub(in crate::qcow2) allocator: Mutex<Allocator>,
    pub(in crate::qcow2) leases: Leases,
    /// L1 entries that are not yet on disk.
    pub(in crate::qcow2) dirty_l1: Mutex<BTreeSet<usize>>,
    /// Offsets of the L2 tables that the L1 table names.
    pub(in crate::qcow2) l2_places: RwLock<HashSet<u64>>,
    /// References that were dropped since the last flush began.
    pub(in crate::qcow2) freed: Mutex<Vec<Freed>>,
    pub(in crate::qcow2) quarantine: Mutex<Quarantine>,
    pub(in crate::qcow2) flush: Mutex<()>,
    /// Counts calls of flush, and up to which call everything is on disk.
    pub(in crate::qcow2) flush_calls: AtomicU64,
    pub(in crate::qcow2) flush_covers: AtomicU64,
    /// Counts changes of metadata, and up to which change everything is on disk.
    pub(in crate::qcow2) changes: AtomicU64,
    pub(in crate::qcow2) durable_changes: AtomicU64,
}

impl Writer {
    pub(in crate::qcow2) fn new(allocator: Allocator) -> Self {
        Self {
            stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
            l1_change: Mutex::new(()),
            commit_gate: RwLock::new(()),
            allocator: Mutex::new(allocator),
            leases: Leases::new(),
            dirty_l1: Mutex::default(),
            l2_places: RwLock::default(),
            freed: Mutex::default(),
            quarantine: Mutex::default(),
            flush: Mutex::new(()),
            flush_calls: AtomicU64::new(0),
            flush_covers: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            durable_changes: AtomicU64::new(0),
        }
    }

    /// Locks the stripes of `count` guest clusters from `first` on; `None` if somebody has one of
    /// them and nothing may be waited for.
    pub(in crate::qcow2) fn lock_clusters(
        &self,
        first: u64,
        count: u64,
        lookup: Lookup,
    ) -> Option<Vec<MutexGuard<'_, ()>>> {
        let mut indexes: Vec<u64> =
            (first..first + count.min(STRIPES)).map(|cluster| cluster % STRIPES).collect();
        // Always in the same order, or two writers could wait for each other.
        indexes.sort_unstable();
        let stripes = indexes.into_iter().map(|index| &self.stripes[index as usize]);
        match lookup {
            Lookup::MayRead => Some(stripes.map(lock).collect()),
            Lookup::CachedOnly => stripes.map(try_lock).collect(),
        }
    }

    pub(in crate::qcow2) fn note_change(&self) {
        self.changes.fetch_add(1, AcqRel);
    }

    /// Whether some change of metadata is not known to be on disk.
    pub(in crate::qcow2) fn has_changes(&self) -> bool {
        self.changes.load(Acquire) != self.durable_changes.load(Acquire)
    }
}

impl Qcow2 {
    pub(in crate::qcow2) fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(unwritable)
    }

    /// Reserves up to `count_max` clusters next to each other.
    pub(in crate::qcow2) fn reserve(&self, count_max: u64) -> Result<Reserved> {
        let writer = self.writer()?;
        self.release_quarantine(writer);
        let reserved = self.allocate(|allocator| allocator.reserve(count_max))?;
        writer.note_change();
        Ok(reserved)
    }

    /// As [`reserve`](Self::reserve), but exactly `count` clusters.
    pub(in crate::qcow2) fn reserve_exact(&self, count: u64) -> Result<Reserved> {
        let reserved = self.allocate(|allocator| allocator.reserve_exact(count))?;
        self.writer()?.note_change();
        Ok(reserved)
    }

    /// Where a refcount block is missing within the file, its clusters may be in use all the same:
    /// all references are counted then, once.
    fn allocate(
        &self,
        mut reserve: impl FnMut(&mut Allocator) -> Result<Reserved>,
    ) -> Result<Reserved> {
        let writer = self.writer()?;
        let mut allocator = lock(&writer.allocator);
        let mut reserved = reserve(&mut allocator);
        if reserved.is_err() && std::mem::take(&mut allocator.wants_used_blocks) {
            drop(allocator);
            let used = self.used_refcount_blocks()?;
            let mut allocator = lock(&writer.allocator);
            allocator.note_used_blocks(used);
            reserved = reserve(&mut allocator);
        } else {
            drop(allocator);
        }
        reserved.map_err(|error| self.metadata.note_damage(error))
    }

    /// As [`reserve`](Self::reserve); `None` if that takes what may not be waited for.
    pub(in crate::qcow2) fn reserve_if(
        &self,
        count_max: u64,
        lookup: Lookup,
    ) -> Result<Option<Reserved>> {
        if lookup == Lookup::MayRead {
            return self.reserve(count_max).map(Some);
        }
        let writer = self.writer()?;
        let Some(mut allocator) = try_lock(&writer.allocator) else { return Ok(None) };
        let reserved = allocator.reserve_in_memory(count_max);
        let reserved = reserved.map_err(|error| self.metadata.note_damage(error))?;
        if reserved.is_some() {
            writer.note_change();
        }
        Ok(reserved)
    }

    pub(in crate::qcow2) fn release(&self, reserved: &[Reserved]) {
        if let (Some(writer), false) = (&self.writer, reserved.is_empty()) {
            let mut allocator = lock(&writer.allocator);
            reserved.iter().for_each(|reserved| allocator.release(*reserved));
            writer.note_change();
        }
    }
}
