//! The cache of L2 tables.
//!
//! Bounded: a clean table that no thread holds gives way to a new one. A changed ("dirty") table stays
//! until [`flush`](crate::qcow2::flush) has written it. A table is loaded under the lock of its shard, so
//! that an old content can never replace a newer one. Each thread remembers the tables that it has
//! used lately: a lookup in one of them writes nothing that another thread reads.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicUsize, fence};

use crate::error::Result;
use crate::mapping::Lookup;
use crate::ordered_lock::{OrderedMutex, OrderedRwLock, rank};
use crate::per_thread::PerThread;
use crate::qcow2::map::table::{DirtyPart, Table};
use crate::units::HostOffset;

type Tables = HashMap<HostOffset, Arc<Table>>;
type Shard = OrderedRwLock<{ rank::TABLE_CACHE }, Tables>;
type Recent = OrderedMutex<{ rank::RECENT_TABLES }, [Option<Arc<Table>>; RECENT_TABLES]>;

/// Number of tables that a thread finds without reading memory that other threads write.
const RECENT_TABLES: usize = 64;

/// Tables by their offset in the file.
#[derive(Debug)]
pub(crate) struct TableCache {
    shards: Vec<Shard>,
    /// Some of the tables in `shards`, each in the place that belongs to its offset. Filled under the
    /// lock of the table's shard; a table leaves these places before it leaves its shard.
    recent: PerThread<Recent>,
    tables_per_shard: usize,
    /// How many tables are dirty; only an estimate for deciding when to write them.
    dirty_count: AtomicUsize,
}

impl TableCache {
    pub(crate) fn new(tables_max: usize) -> Self {
        let shard_count = (tables_max / 8).clamp(1, 64).next_power_of_two();
        Self {
            shards: (0..shard_count).map(|_| Shard::default()).collect(),
            recent: PerThread::new(|| OrderedMutex::new([const { None }; RECENT_TABLES])),
            tables_per_shard: tables_max.div_ceil(shard_count).max(2),
            dirty_count: AtomicUsize::new(0),
        }
    }

    fn shard(&self, offset: HostOffset) -> &Shard {
        &self.shards[mixed(offset) & (self.shards.len() - 1)]
    }

    /// Looks something up in the table at `offset`, which is loaded if it is not in memory; `None` if
    /// it may not be. Waits for other threads only if the table is not among the recent ones.
    #[inline]
    pub(crate) fn look<T>(
        &self,
        offset: HostOffset,
        lookup: Lookup,
        load: impl FnOnce() -> Result<Vec<u64>>,
        found: impl FnOnce(&Table) -> T,
    ) -> Result<Option<T>> {
        let recent = self.recent.mine().lock();
        if let Some(table) = &recent[place(offset)]
            && table.offset == offset
        {
            table.note_use();
            return Ok(Some(found(table)));
        }
        drop(recent);
        Ok(self.find(offset, lookup, load)?.map(|table| found(&table)))
    }

    /// The table at `offset`, as for [`look`](Self::look).
    pub(crate) fn find(
        &self,
        offset: HostOffset,
        lookup: Lookup,
        load: impl FnOnce() -> Result<Vec<u64>>,
    ) -> Result<Option<Arc<Table>>> {
        let shard = self.shard(offset);
        let tables = match lookup {
            Lookup::CachedOnly => shard.try_read(),
            Lookup::MayRead => Some(shard.read()),
        };
        let Some(tables) = tables else { return Ok(None) };
        if let Some(table) = tables.get(&offset) {
            return Ok(Some(self.used(table)));
        }
        drop(tables);
        if lookup == Lookup::CachedOnly {
            return Ok(None);
        }
        let mut tables = shard.write();
        if let Some(table) = tables.get(&offset) {
            return Ok(Some(self.used(table)));
        }
        let table = Arc::new(Table::new(offset, load()?));
        self.make_room(&mut tables);
        tables.insert(offset, Arc::clone(&table));
        Ok(Some(self.used(&table)))
    }

    /// Notes that this thread uses a table. The caller has locked its shard.
    fn used(&self, table: &Arc<Table>) -> Arc<Table> {
        table.note_use();
        self.recent.mine().lock()[place(table.offset)] = Some(Arc::clone(table));
        Arc::clone(table)
    }

    /// Puts a new table into the cache, in place of the one for its offset.
    pub(crate) fn insert(&self, table: Arc<Table>) {
        let mut tables = self.shard(table.offset).write();
        self.make_room(&mut tables);
        self.forget_recent(table.offset);
        tables.insert(table.offset, table);
    }

    /// Removes the table at `offset` from the recent tables of all threads. None gets it back while
    /// its shard is locked.
    fn forget_recent(&self, offset: HostOffset) {
        for recent in self.recent.all() {
            recent.lock()[place(offset)].take_if(|table| table.offset == offset);
        }
    }

    fn make_room(&self, tables: &mut Tables) {
        if tables.len() < self.tables_per_shard {
            return;
        }
        // Twice: what is not used between two looks goes.
        for _ in 0..2 {
            for table in tables.values() {
                if table.is_dirty() || table.was_used() {
                    continue;
                }
                let offset = table.offset;
                self.forget_recent(offset);
                // A thread that holds the table may change it.
                if Arc::strong_count(table) > 1 {
                    continue;
                }
                // None does any more, but one may have since the first look.
                fence(Acquire);
                if !table.is_dirty() {
                    tables.remove(&offset);
                    return;
                }
            }
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
            let tables = shard.read();
            for table in tables.values() {
                if let Some(part) = table.change().take_dirty() {
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
            if table.change().mark_dirty(part.first_word, end) {
                self.note_dirty();
            }
        }
    }
}

/// Tables lie on cluster boundaries: mixes the upper bits down.
fn mixed(offset: HostOffset) -> usize {
    ((offset.bytes() >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize
}

/// Where a table stands among the recent ones.
fn place(offset: HostOffset) -> usize {
    mixed(offset) % RECENT_TABLES
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn load(cache: &TableCache, offset: u64, words: Vec<u64>) -> Arc<Table> {
        cache.find(HostOffset::new(offset), Lookup::MayRead, || Ok(words)).unwrap().unwrap()
    }

    fn in_memory(cache: &TableCache, offset: u64) -> Option<u64> {
        let look = |table: &Table| table.entry(0, 1).0;
        cache.look(HostOffset::new(offset), Lookup::CachedOnly, || unreachable!(), look).unwrap()
    }

    #[test]
    fn clean_tables_give_way_and_dirty_or_held_ones_stay() {
        let cache = TableCache::new(4);
        let held = load(&cache, 0x10000, vec![1; 64]);
        let dirty = load(&cache, 0x20000, vec![2; 64]);
        dirty.change().mark_dirty(3, 4);
        cache.note_dirty();
        drop(dirty);
        for i in 3..100 {
            load(&cache, i * 0x10000, vec![0; 64]);
        }
        let count: usize = cache.shards.iter().map(|shard| shard.read().len()).sum();
        assert!(count <= 5, "{count} tables");
        assert_eq!(in_memory(&cache, 0x10000), Some(1));
        let parts = cache.take_dirty();
        assert_eq!(parts.len(), 1);
        assert_eq!((parts[0].1.first_word, parts[0].1.bytes.len()), (0, 512));
        drop(held);
    }

    #[test]
    fn a_table_that_was_replaced_or_gave_way_is_seen_by_no_thread() {
        let cache = TableCache::new(2);
        let look = |offset| in_memory(&cache, offset);
        let looks = || {
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| look(0x10000))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            })
        };
        load(&cache, 0x10000, vec![1; 64]);
        assert_eq!(looks(), [Some(1); 8]);
        cache.insert(Arc::new(Table::new(HostOffset::new(0x10000), vec![2; 64])));
        assert_eq!(looks(), [Some(2); 8]);
        for i in 2..9 {
            load(&cache, i * 0x10000, vec![0; 64]);
        }
        assert_eq!(looks(), [None; 8]);
    }

    #[test]
    fn a_change_that_is_made_while_tables_give_way_is_not_lost() {
        const OFFSET: u64 = 0x10000;
        let (cache, is_done) = (TableCache::new(2), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for i in (2..100).cycle().take_while(|_| !is_done.load(Relaxed)) {
                    load(&cache, i * OFFSET, vec![0; 64]);
                }
            });
            let mut on_disk = 0;
            let stale = (1..20_000).find(|number| {
                let table = load(&cache, OFFSET, vec![on_disk; 64]);
                for _ in 0..number % 64 {
                    std::hint::spin_loop();
                }
                let is_stale = table.entry(0, 1).0 != number - 1;
                table.change().set(0, 1, (*number, 0));
                drop(table);
                for (table, _) in cache.take_dirty() {
                    on_disk = table.entry(0, 1).0;
                }
                is_stale
            });
            is_done.store(true, Relaxed);
            assert_eq!(stale, None, "the change before this one is gone");
        });
    }
}
