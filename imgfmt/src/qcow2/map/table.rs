//! One L2 table in memory.
//!
//! Entries are read without a lock; changes hold the table's lock.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64, fence};
use std::sync::{MutexGuard, OnceLock};

use crate::ordered_lock::{Ordered, OrderedMutex, rank};
use crate::units::HostOffset;

/// Words per 512 bytes: changes are written in whole sectors.
const SECTOR_WORDS: usize = 64;

/// The number of times a read of an entry is tried while entries change, before it waits for the
/// change.
const TRIES: u32 = 100;

/// An L2 table.
#[derive(Debug)]
pub(crate) struct Table {
    /// Its offset in the file.
    pub(crate) offset: HostOffset,
    words: Box<[AtomicU64]>,
    /// Counts the starts and ends of changes of an entry: odd during a change.
    version: AtomicU64,
    /// First and last (excluded) word that is not yet on disk. A change of words holds the lock.
    dirty: OrderedMutex<{ rank::TABLE }, Option<(usize, usize)>>,
    /// Entries through which nothing may be changed; see [`guard`](crate::qcow2::map::guard).
    /// Searched before the first change.
    pub(crate) bad_entries: OnceLock<Vec<u32>>,
    recently_used: AtomicBool,
    /// Whether it is in the mapping tables' list of changed units.
    is_listed_as_changed: AtomicBool,
}

/// Exclusive access to a table: no other thread changes it.
#[derive(Debug)]
pub(crate) struct TableChange<'a> {
    table: &'a Table,
    dirty: Ordered<MutexGuard<'a, Option<(usize, usize)>>>,
}

/// Changed words that are about to be written.
#[derive(Debug)]
pub(crate) struct DirtyPart {
    pub(crate) first_word: usize,
    pub(crate) bytes: Vec<u8>,
}

impl Table {
    pub(crate) fn new(offset: HostOffset, words: Vec<u64>) -> Self {
        Self {
            offset,
            words: words.into_iter().map(AtomicU64::new).collect(),
            version: AtomicU64::new(0),
            dirty: OrderedMutex::default(),
            bad_entries: OnceLock::new(),
            recently_used: AtomicBool::new(false),
            is_listed_as_changed: AtomicBool::new(false),
        }
    }

    /// Its number of words.
    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    /// The entry that begins with word `first` and has one word or two, which are read
    /// consistently; the second is 0 if there is none.
    #[inline]
    pub(crate) fn entry(&self, first: usize, words: usize) -> (u64, u64) {
        if words == 1 {
            return (self.words[first].load(Acquire), 0);
        }
        let load = || (self.words[first].load(Relaxed), self.words[first + 1].load(Relaxed));
        for _ in 0..TRIES {
            let version = self.version.load(Acquire);
            let entry = load();
            fence(Acquire);
            if version.is_multiple_of(2) && self.version.load(Relaxed) == version {
                return entry;
            }
            std::hint::spin_loop();
        }
        let _unchanged = self.change();
        load()
    }

    /// All words at one instant.
    pub(crate) fn words(&self) -> Vec<u64> {
        let _unchanged = self.change();
        self.words.iter().map(|word| word.load(Relaxed)).collect()
    }

    /// Keeps other threads from changing the table.
    pub(crate) fn change(&self) -> TableChange<'_> {
        TableChange { table: self, dirty: self.dirty.lock() }
    }

    /// Whether a part of it is not on disk, or is being changed.
    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty.try_lock().is_none_or(|dirty| dirty.is_some())
    }

    /// Records a use of the table.
    #[inline]
    pub(crate) fn note_use(&self) {
        // Usually it is recorded already: a store would take the cache line from other threads.
        if !self.recently_used.load(Relaxed) {
            self.recently_used.store(true, Relaxed);
        }
    }

    /// Calls `list` unless it was called before for this table.
    pub(crate) fn list_as_changed(&self, list: impl FnOnce()) {
        if !self.is_listed_as_changed.load(Acquire) {
            list();
            self.is_listed_as_changed.store(true, Release);
        }
    }

    /// Whether a use was recorded since the last call.
    pub(crate) fn was_used(&self) -> bool {
        self.recently_used.swap(false, Relaxed)
    }
}

impl TableChange<'_> {
    /// Changes the entry that begins with word `first`, of one word or two. Returns whether the
    /// table was clean before.
    pub(crate) fn set(&mut self, first: usize, words: usize, entry: (u64, u64)) -> bool {
        let table = self.table;
        let version = table.version.load(Relaxed);
        table.version.store(version.wrapping_add(1), Relaxed);
        fence(Release);
        table.words[first].store(entry.0, Release);
        if words == 2 {
            table.words[first + 1].store(entry.1, Release);
        }
        table.version.store(version.wrapping_add(2), Release);
        self.mark_dirty(first, first + words)
    }

    /// Records that words from `first` to `end` (excluded) were changed. Returns whether the table
    /// was clean before.
    pub(crate) fn mark_dirty(&mut self, first: usize, end: usize) -> bool {
        let was_clean = self.dirty.is_none();
        let (old_first, old_end) = self.dirty.unwrap_or((first, end));
        *self.dirty = Some((old_first.min(first), old_end.max(end)));
        was_clean
    }

    /// Takes a copy of the changed words and marks the table as clean.
    pub(crate) fn take_dirty(&mut self) -> Option<DirtyPart> {
        let (first, end) = self.dirty.take()?;
        let first_word = first / SECTOR_WORDS * SECTOR_WORDS;
        let end = end.next_multiple_of(SECTOR_WORDS).min(self.table.len());
        let words = self.table.words[first_word..end].iter();
        let bytes = words.flat_map(|word| word.load(Relaxed).to_be_bytes()).collect();
        Some(DirtyPart { first_word, bytes })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn a_table_is_listed_as_changed_once() {
        let table = Table::new(HostOffset::new(0), vec![0; 64]);
        let mut times = 0;
        (0..3).for_each(|_| table.list_as_changed(|| times += 1));
        assert_eq!(times, 1);
    }

    #[test]
    fn the_two_words_of_an_entry_are_read_as_they_were_written() {
        let table = Table::new(HostOffset::new(0), vec![0; 64]);
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 1..50_000 {
                    table.change().set(2, 2, (number, !number));
                }
                is_done.store(true, Relaxed);
            });
            while !is_done.load(Relaxed) {
                let (entry, bitmap) = table.entry(2, 2);
                assert!(bitmap == !entry || (entry, bitmap) == (0, 0), "{entry} {bitmap}");
            }
        });
        assert_eq!(table.entry(2, 2), (49_999, !49_999));
    }
}
