//! The cache of L2 tables.
//!
//! Bounded: a clean table that nobody holds gives way to a new one. A changed ("dirty") table stays
//! until [`flush`](crate::qcow2::flush) has written it. A table is loaded under the lock of its shard, so
//! that an old content can never replace a newer one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, MutexGuard, OnceLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::Result;
use crate::ordered_lock::{Ordered, OrderedMutex, OrderedRwLock, rank};

/// One L2 table in memory.
#[derive(Debug)]
pub(crate) struct Table {
    /// Where it lies in the file.
    pub(crate) offset: u64,
    content: OrderedRwLock<{ rank::TABLE }, TableContent>,
    /// Entries through which nothing may be changed; see [`guard`](crate::qcow2::map::guard).
    /// Looked for before the first change.
    pub(crate) bad_entries: OnceLock<Vec<u32>>,
    recently_used: AtomicBool,
}

/// The words of a table and which of them are not yet on disk.
#[derive(Debug)]
pub(crate) struct TableContent {
    pub(crate) words: Vec<u64>,
    /// First and last (excluded) changed word.
    dirty: Option<(usize, usize)>,
}

/// Changed words that are about to be written.
#[derive(Debug)]
pub(crate) struct DirtyPart {
    pub(crate) first_word: usize,
    pub(crate) bytes: Vec<u8>,
}

/// Words per 512 bytes: changes are written in whole sectors.
const SECTOR_WORDS: usize = 64;

impl Table {
    pub(crate) fn new(offset: u64, words: Vec<u64>) -> Self {
        let content = OrderedRwLock::new(TableContent { words, dirty: None });
        let bad_entries = OnceLock::new();
        Self { offset, content, bad_entries, recently_used: AtomicBool::new(true) }
    }

    pub(crate) fn read(&self) -> Ordered<RwLockReadGuard<'_, TableContent>> {
        self.content.read()
    }

    pub(crate) fn write(&self) -> Ordered<RwLockWriteGuard<'_, TableContent>> {
        self.content.write()
    }
}

impl TableContent {
    /// Notes that words from `first` to `end` (excluded) were changed. Returns whether the table
    /// was clean before.
    pub(crate) fn mark_dirty(&mut self, first: usize, end: usize) -> bool {
        let was_clean = self.dirty.is_none();
        let (old_first, old_end) = self.dirty.unwrap_or((first, end));
        self.dirty = Some((old_first.min(first), old_end.max(end)));
        was_clean
    }

    /// Takes a copy of what was changed and calls the table clean.
    pub(crate) fn take_dirty(&mut self) -> Option<DirtyPart> {
        let (first, end) = self.dirty.take()?;
        let first_word = first / SECTOR_WORDS * SECTOR_WORDS;
        let end = end.next_multiple_of(SECTOR_WORDS).min(self.words.len());
        let bytes = self.words[first_word..end].iter().flat_map(|word| word.to_be_bytes());
        Some(DirtyPart { first_word, bytes: bytes.collect() })
    }
}

type Shard = OrderedMutex<{ rank::TABLE_CACHE }, HashMap<u64, Arc<Table>>>;

/// Tables by their offset in the file.
#[derive(Debug)]
pub(crate) struct TableCache {
    shards: Vec<Shard>,
    tables_per_shard: usize,
    /// How many tables are dirty; only an estimate for deciding when to write them.
    dirty_count: AtomicUsize,
}

impl TableCache {
    pub(crate) fn new(tables_max: usize) -> Self {
        let shard_count = (tables_max / 8).clamp(1, 64).next_power_of_two();
        Self {
            shards: (0..shard_count).map(|_| Shard::default()).collect(),
            tables_per_shard: tables_max.div_ceil(shard_count).max(2),
            dirty_count: AtomicUsize::new(0),
        }
    }

    fn shard(&self, offset: u64) -> &Shard {
        // Tables lie on cluster boundaries: mix the upper bits down.
        let mixed = (offset >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        &self.shards[mixed as usize & (self.shards.len() - 1)]
    }

    fn lock(&self, offset: u64) -> Ordered<MutexGuard<'_, HashMap<u64, Arc<Table>>>> {
        self.shard(offset).lock()
    }

    /// The table at `offset`, loaded if it is not in memory.
    pub(crate) fn load(
        &self,
        offset: u64,
        load: impl FnOnce() -> Result<Vec<u64>>,
    ) -> Result<Arc<Table>> {
        let mut shard = self.lock(offset);
        if let Some(table) = shard.get(&offset) {
            table.recently_used.store(true, Relaxed);
            return Ok(Arc::clone(table));
        }
        let table = Arc::new(Table::new(offset, load()?));
        self.make_room(&mut shard);
        shard.insert(offset, Arc::clone(&table));
        Ok(table)
    }

    /// The table at `offset` if that needs no waiting.
    pub(crate) fn try_load(&self, offset: u64) -> Option<Arc<Table>> {
        let shard = self.shard(offset).try_lock()?;
        let table = shard.get(&offset)?;
        table.recently_used.store(true, Relaxed);
        Some(Arc::clone(table))
    }

    /// Puts a new table into the cache, in place of whatever was remembered for its offset.
    pub(crate) fn insert(&self, table: Arc<Table>) {
        let mut shard = self.lock(table.offset);
        self.make_room(&mut shard);
        shard.insert(table.offset, table);
    }

    fn make_room(&self, shard: &mut HashMap<u64, Arc<Table>>) {
        if shard.len() < self.tables_per_shard {
            return;
        }
        let mut fallback = None;
        let mut victim = None;
        for (offset, table) in shard.iter() {
            // Whoever else holds the table may be about to change it.
            if Arc::strong_count(table) > 1 || table.read().dirty.is_some() {
                continue;
            }
            if table.recently_used.swap(false, Relaxed) {
                fallback.get_or_insert(*offset);
            } else {
                victim = Some(*offset);
                break;
            }
        }
        if let Some(offset) = victim.or(fallback) {
            shard.remove(&offset);
        }
    }

    pub(crate) fn note_dirty(&self) {
        self.dirty_count.fetch_add(1, Relaxed);
    }

    /// Whether so many tables are dirty that they should be written before more become so.
    pub(crate) fn is_under_pressure(&self) -> bool {
        self.dirty_count.load(Relaxed) > self.tables_per_shard * self.shards.len()
    }

    /// Takes copies of all dirty parts, with their tables so that these stay in memory.
    pub(crate) fn take_dirty(&self) -> Vec<(Arc<Table>, DirtyPart)> {
        let mut parts = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            for table in shard.values() {
                if let Some(part) = table.write().take_dirty() {
                    parts.push((Arc::clone(table), part));
                }
            }
        }
        self.dirty_count.store(0, Relaxed);
        parts
    }

    /// Takes back parts that could not be written.
    pub(crate) fn return_dirty(&self, parts: &[(Arc<Table>, DirtyPart)]) {
        for (table, part) in parts {
            let end = part.first_word + part.bytes.len() / 8;
            if table.write().mark_dirty(part.first_word, end) {
                self.note_dirty();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_tables_give_way_and_dirty_or_held_ones_stay() {
        let cache = TableCache::new(4);
        let held = cache.load(0x10000, || Ok(vec![1; 64])).unwrap();
        let dirty = cache.load(0x20000, || Ok(vec![2; 64])).unwrap();
        dirty.write().mark_dirty(3, 4);
        cache.note_dirty();
        drop(dirty);
        for i in 3..100 {
            cache.load(i * 0x10000, || Ok(vec![0; 64])).unwrap();
        }
        let count: usize = cache.shards.iter().map(|shard| shard.lock().len()).sum();
        assert!(count <= 5, "{count} tables");
        assert!(cache.try_load(0x10000).is_some());
        let parts = cache.take_dirty();
        assert_eq!(parts.len(), 1);
        assert_eq!((parts[0].1.first_word, parts[0].1.bytes.len()), (0, 512));
        drop(held);
    }
}
