//! The cache of L2 tables.
//!
//! Tables are cached in slices of equal size, which this module calls tables. If all tables of the
//! disk fit into the cache, a slice is a complete table or a large part of it; otherwise it has 4
//! KiB.
//!
//! The size is bounded: a clean table that no thread holds is evicted for a new one. A changed
//! ("dirty") table stays until [`flush`](crate::qcow2::flush) has written it.
//!
//! No lock is held while a table is read. Its place in the cache is marked as loading, so no other
//! thread reads or changes it, and old content never replaces newer content. Each thread keeps the
//! tables that it has used recently: a lookup in one of them writes no memory that another thread
//! reads.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicUsize, fence};

use crate::error::Result;
use crate::mapping::Lookup;
use crate::ordered_lock::{OrderedMutex, OrderedRwLock, rank};
use crate::per_thread::PerThread;
use crate::qcow2::map::load::Load;
use crate::qcow2::map::table::{DirtyPart, Table};
use crate::units::HostOffset;

type Shard = OrderedRwLock<{ rank::TABLE_CACHE }, ShardTables>;
type Recent = OrderedMutex<{ rank::RECENT_TABLES }, [Option<Arc<Table>>; RECENT_TABLES]>;

/// Number of recently used tables per thread, which it finds without reading memory that other
/// threads write.
const RECENT_TABLES: usize = 64;

/// Tables by their offset in the file.
#[derive(Debug)]
pub(crate) struct TableCache {
    shards: Vec<Shard>,
    /// Some of the tables in `shards`, each in the place for its offset. Filled under the lock of
    /// the table's shard; a table is removed here before it is removed from its shard.
    recent: PerThread<Recent>,
    tables_per_shard: usize,
    /// The number of dirty tables; only an estimate for deciding when to write them.
    dirty_count: AtomicUsize,
}

/// The tables of a shard.
#[derive(Debug, Default)]
struct ShardTables {
    by_offset: HashMap<HostOffset, CachedTable>,
    /// The offsets of the loaded tables; the first candidates for eviction are at the front.
    order: VecDeque<HostOffset>,
}

#[derive(Debug)]
enum CachedTable {
    Table(Arc<Table>),
    Loading(Arc<Load>),
}

impl CachedTable {
    fn table(&self) -> Option<&Arc<Table>> {
        match self {
            Self::Table(table) => Some(table),
            Self::Loading(_) => None,
        }
    }
}

impl ShardTables {
    fn put(&mut self, table: Arc<Table>) {
        let offset = table.offset;
        let before = self.by_offset.insert(offset, CachedTable::Table(table));
        if !matches!(before, Some(CachedTable::Table(_))) {
            self.order.push_back(offset);
        }
    }

    fn tables(&self) -> impl Iterator<Item = &Arc<Table>> {
        self.by_offset.values().filter_map(CachedTable::table)
    }
}

/// The result of a lookup of a table.
enum Found<'c> {
    Table(Arc<Table>),
    /// Another thread is reading it.
    Loading(Arc<Load>),
    /// This thread has to read it.
    Nothing(Loading<'c>),
    /// Another thread holds the lock, and the lookup must not wait.
    Unknown,
}

/// The duty to read a table. If it is dropped, another thread may take it.
struct Loading<'c> {
    cache: &'c TableCache,
    offset: HostOffset,
    load: Arc<Load>,
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

    /// Calls `found` with the table at `offset`, which is loaded if it is not in memory. Returns
    /// `None` if that would have to wait and `lookup` forbids it; `load` then returns `None`. Waits
    /// for other threads only if the table is not among the recent ones.
    #[inline]
    pub(crate) fn look<T>(
        &self,
        offset: HostOffset,
        lookup: Lookup,
        load: impl Fn() -> Result<Option<Vec<u64>>>,
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
        load: impl Fn() -> Result<Option<Vec<u64>>>,
    ) -> Result<Option<Arc<Table>>> {
        loop {
            match self.place_of(offset, lookup) {
                Found::Table(table) => return Ok(Some(table)),
                Found::Loading(other) => {
                    if lookup == Lookup::CachedOnly {
                        return Ok(None);
                    }
                    if let Some(table) = other.wait() {
                        return Ok(Some(table));
                    }
                }
                Found::Nothing(loading) => {
                    let Some(words) = load()? else { return Ok(None) };
                    if let Some(table) = loading.end(Arc::new(Table::new(offset, words))) {
                        return Ok(Some(table));
                    }
                }
                Found::Unknown => return Ok(None),
            }
        }
    }

    /// Returns the state of a table's place. If it is empty, this thread has to read the table.
    fn place_of(&self, offset: HostOffset, lookup: Lookup) -> Found<'_> {
        let shard = self.shard(offset);
        let places = match lookup {
            Lookup::CachedOnly => shard.try_read(),
            Lookup::MayRead => Some(shard.read()),
        };
        let Some(places) = places else { return Found::Unknown };
        if let Some(place) = places.by_offset.get(&offset) {
            return self.found(place);
        }
        drop(places);
        let places = match lookup {
            Lookup::CachedOnly => shard.try_write(),
            Lookup::MayRead => Some(shard.write()),
        };
        let Some(mut places) = places else { return Found::Unknown };
        if let Some(place) = places.by_offset.get(&offset) {
            return self.found(place);
        }
        let load = Arc::new(Load::default());
        places.by_offset.insert(offset, CachedTable::Loading(Arc::clone(&load)));
        Found::Nothing(Loading { cache: self, offset, load })
    }

    /// The caller has locked the shard.
    fn found(&self, place: &CachedTable) -> Found<'_> {
        match place {
            CachedTable::Table(table) => Found::Table(self.used(table)),
            CachedTable::Loading(load) => Found::Loading(Arc::clone(load)),
        }
    }

    /// Records that this thread uses a table. The caller has locked its shard.
    fn used(&self, table: &Arc<Table>) -> Arc<Table> {
        table.note_use();
        self.remember(table)
    }

    /// Puts a table among the recent ones of this thread. The caller has locked its shard.
    fn remember(&self, table: &Arc<Table>) -> Arc<Table> {
        self.recent.mine().lock()[place(table.offset)] = Some(Arc::clone(table));
        Arc::clone(table)
    }

    /// Puts a new table into the cache, in place of the one for its offset.
    pub(crate) fn insert(&self, table: Arc<Table>) {
        let mut places = self.shard(table.offset).write();
        self.make_room(&mut places, 1);
        self.forget_recent(table.offset);
        places.put(table);
    }

    /// Removes the table at `offset` from the recent tables of all threads. None gets it back while
    /// its shard is locked.
    fn forget_recent(&self, offset: HostOffset) {
        for recent in self.recent.all() {
            recent.lock()[place(offset)].take_if(|table| table.offset == offset);
        }
    }

    /// Evicts tables, approximately the least recently used ones, until `new_places` more fit.
    fn make_room(&self, places: &mut ShardTables, new_places: usize) {
        // Twice: a table that is not used between two looks is evicted.
        for _ in 0..2 * places.order.len() {
            if places.by_offset.len() + new_places <= self.tables_per_shard {
                return;
            }
            let Some(offset) = places.order.pop_front() else { return };
            if self.gives_way(places, offset) {
                places.by_offset.remove(&offset);
            } else {
                places.order.push_back(offset);
            }
        }
    }

    /// Whether a table can be evicted: no thread needs it, and everything in it is on disk. Its
    /// shard is locked.
    fn gives_way(&self, places: &ShardTables, offset: HostOffset) -> bool {
        let Some(table) = places.by_offset.get(&offset).and_then(CachedTable::table) else {
            return true;
        };
        if table.is_dirty() || table.was_used() {
            return false;
        }
        self.forget_recent(offset);
        // A thread that holds the table may change it.
        if Arc::strong_count(table) > 1 {
            return false;
        }
        // No thread holds it any more, but one may have changed it since the first check.
        fence(Acquire);
        !table.is_dirty()
    }

    pub(crate) fn note_dirty(&self) {
        self.dirty_count.fetch_add(1, Relaxed);
    }

    /// Whether so many tables are dirty that they should be written before others change.
    pub(crate) fn is_under_pressure(&self) -> bool {
        self.dirty_count.load(Relaxed) > self.tables_per_shard * self.shards.len()
    }

    /// Copies all dirty parts and marks them as clean. The tables are returned too, so they stay in
    /// memory.
    pub(crate) fn take_dirty(&self) -> Vec<(Arc<Table>, DirtyPart)> {
        let mut parts = Vec::new();
        for shard in &self.shards {
            let places = shard.read();
            for table in places.tables() {
                if let Some(part) = table.change().take_dirty() {
                    parts.push((Arc::clone(table), part));
                }
            }
        }
        self.dirty_count.store(0, Relaxed);
        parts
    }

    /// Marks parts that could not be written as dirty again.
    pub(crate) fn return_dirty(&self, parts: &[(Arc<Table>, DirtyPart)]) {
        for (table, part) in parts {
            let end = part.first_word + part.bytes.len() / 8;
            if table.change().mark_dirty(part.first_word, end) {
                self.note_dirty();
            }
        }
    }
}

impl Loading<'_> {
    /// Puts the table that was read into the cache. Returns the table that is there now: another
    /// one if one was created there meanwhile. `None` if that one was evicted again.
    fn end(self, table: Arc<Table>) -> Option<Arc<Table>> {
        let mut places = self.cache.shard(self.offset).write();
        match places.by_offset.get(&self.offset) {
            Some(CachedTable::Loading(load)) if Arc::ptr_eq(load, &self.load) => {}
            Some(CachedTable::Table(other)) => return Some(self.cache.used(other)),
            _ => return None,
        }
        // The place exists already.
        self.cache.make_room(&mut places, 0);
        // It was not in memory: only the second lookup of a table counts as use.
        let used = self.cache.remember(&table);
        places.put(table);
        drop(places);
        self.load.end(Arc::clone(&used));
        Some(used)
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut places = self.cache.shard(self.offset).write();
        if let Some(CachedTable::Loading(load)) = places.by_offset.get(&self.offset)
            && Arc::ptr_eq(load, &self.load)
        {
            places.by_offset.remove(&self.offset);
        }
        drop(places);
        self.load.give_up();
    }
}

/// Tables are aligned to clusters, so this mixes the upper bits into the lower ones.
fn mixed(offset: HostOffset) -> usize {
    ((offset.bytes() >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize
}

/// The index of a table among the recent ones.
fn place(offset: HostOffset) -> usize {
    mixed(offset) % RECENT_TABLES
}

#[cfg(test)]
mod tests;
