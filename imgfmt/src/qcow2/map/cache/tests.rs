use std::sync::atomic::Ordering::Release;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use super::*;
use crate::error::{Error, ErrorKind};

fn load(cache: &TableCache, offset: u64, words: Vec<u64>) -> Arc<Table> {
    cache
        .find(HostOffset::new(offset), Lookup::MayRead, || Ok(Some(words.clone())))
        .unwrap()
        .unwrap()
}

fn in_memory(cache: &TableCache, offset: u64) -> Option<u64> {
    let look = |table: &Table| table.entry(0, 1).0;
    cache.look(HostOffset::new(offset), Lookup::CachedOnly, || Ok(None), look).unwrap()
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
    let count: usize = cache.shards.iter().map(|shard| shard.read().by_offset.len()).sum();
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

#[test]
fn the_tables_that_give_way_are_those_that_were_not_used_lately() {
    let cache = TableCache::new(4);
    for i in 1..4 {
        load(&cache, i * 0x10000, vec![i; 64]);
    }
    // Another part of the disk is used from now on, and one of the old tables.
    for i in 4..40 {
        load(&cache, i * 0x10000, vec![i; 64]);
        assert_eq!(in_memory(&cache, i * 0x10000), Some(i));
        load(&cache, 0x10000, vec![i; 64]);
    }
    // It was read again at most once, when all were new.
    assert!(in_memory(&cache, 0x10000).is_some_and(|read_at| read_at < 8));
    assert_eq!((in_memory(&cache, 0x20000), in_memory(&cache, 0x30000)), (None, None));
    let places = cache.shards[0].read();
    assert_eq!((places.by_offset.len(), places.order.len()), (4, 4));
}

#[test]
fn the_memory_of_changed_tables_is_given_back_when_they_are_on_disk() {
    let cache = TableCache::new(4);
    for i in 1..=20 {
        let table = Table::new(HostOffset::new(i * 0x10000), vec![i; 64]);
        table.change().mark_dirty(0, table.len());
        cache.note_dirty();
        cache.insert(Arc::new(table));
    }
    assert_eq!(cache.shards[0].read().by_offset.len(), 20);
    drop(cache.take_dirty());
    load(&cache, 21 * 0x10000, vec![21; 64]);
    assert_eq!(cache.shards[0].read().by_offset.len(), 4);
}

/// Threads meet here; what one waits for has happened when it goes on.
fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

/// Reads the table at 0x10000, all ones, until it may end.
fn read_slowly(
    cache: &TableCache,
    is_reading: &AtomicBool,
    may_end: &AtomicBool,
) -> Result<Option<u64>> {
    let load = || {
        is_reading.store(true, Release);
        wait_until(|| may_end.load(Acquire));
        Ok(Some(vec![1; 64]))
    };
    cache.look(HostOffset::new(0x10000), Lookup::MayRead, load, |table| table.entry(0, 1).0)
}

#[test]
fn a_table_that_is_being_read_does_not_delay_the_use_of_another_one() {
    // One shard.
    let (cache, is_reading, may_end) =
        (TableCache::new(4), AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| read_slowly(&cache, &is_reading, &may_end));
        wait_until(|| is_reading.load(Acquire));
        assert_eq!(load(&cache, 0x20000, vec![2; 64]).entry(0, 1).0, 2);
        // Nor does a lookup wait that must not.
        assert_eq!(in_memory(&cache, 0x10000), None);
        assert_eq!(in_memory(&cache, 0x20000), Some(2));
        may_end.store(true, Release);
        assert_eq!(slow.join().unwrap().unwrap(), Some(1));
    });
    assert_eq!(in_memory(&cache, 0x10000), Some(1));
}

#[test]
fn a_table_that_several_threads_miss_is_read_once() {
    const THREADS: usize = 8;
    let (cache, reads, begun) = (TableCache::new(4), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                begun.fetch_add(1, Relaxed);
                let load = || {
                    reads.fetch_add(1, Relaxed);
                    wait_until(|| begun.load(Relaxed) == THREADS);
                    std::thread::sleep(Duration::from_millis(20));
                    Ok(Some(vec![7; 64]))
                };
                let found =
                    cache.find(HostOffset::new(0x10000), Lookup::MayRead, load).unwrap().unwrap();
                assert_eq!(found.entry(0, 1).0, 7);
            });
        }
    });
    assert_eq!(reads.load(Relaxed), 1);
}

#[test]
fn a_table_that_one_thread_cannot_read_is_read_by_the_next() {
    let (cache, is_reading) = (TableCache::new(4), AtomicBool::new(false));
    let fail = |how: fn() -> Result<Option<Vec<u64>>>| {
        is_reading.store(false, Relaxed);
        std::thread::scope(|scope| {
            let failing = scope.spawn(|| {
                let load = || {
                    is_reading.store(true, Release);
                    std::thread::sleep(Duration::from_millis(20));
                    how()
                };
                let find = || cache.find(HostOffset::new(0x10000), Lookup::MayRead, load);
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(find))
            });
            wait_until(|| is_reading.load(Acquire));
            let found = load(&cache, 0x10000, vec![3; 64]);
            assert_eq!(found.entry(0, 1).0, 3);
            // The place is free for the next case.
            drop((failing.join().unwrap(), found));
            for i in 2..9 {
                load(&cache, i * 0x10000, vec![0; 64]);
            }
            assert_eq!(in_memory(&cache, 0x10000), None);
        });
    };
    fail(|| Err(Error::new(ErrorKind::Io, "read", "the medium failed")));
    fail(|| Ok(None));
    fail(|| panic!("a bug in reading"));
}

#[test]
fn a_table_that_is_made_while_an_old_content_is_read_stays() {
    let (cache, is_reading, may_end) =
        (TableCache::new(4), AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_slowly(&cache, &is_reading, &may_end));
        wait_until(|| is_reading.load(Acquire));
        cache.insert(Arc::new(Table::new(HostOffset::new(0x10000), vec![2; 64])));
        may_end.store(true, Release);
        assert_eq!(reader.join().unwrap().unwrap(), Some(2));
    });
    assert_eq!(in_memory(&cache, 0x10000), Some(2));
}

/// Tables on a disk, and what each should hold.
struct Disk {
    tables: Vec<(AtomicU64, OrderedMutex<{ rank::STRIPE }, u64>)>,
    reads: AtomicU64,
}

impl Disk {
    const TABLES: usize = 24;

    fn offset(number: usize) -> HostOffset {
        HostOffset::new((number as u64 + 1) * 0x10000)
    }

    fn find(&self, cache: &TableCache, number: usize) -> Arc<Table> {
        let load = || {
            self.reads.fetch_add(1, Relaxed);
            let word = self.tables[number].0.load(Acquire);
            std::thread::yield_now();
            Ok(Some(vec![word; 64]))
        };
        cache.find(Self::offset(number), Lookup::MayRead, load).unwrap().unwrap()
    }

    /// Counts one more in a table, as a write does that holds its stripe.
    fn change(&self, cache: &TableCache, number: usize) {
        let mut expected = self.tables[number].1.lock();
        let table = self.find(cache, number);
        assert_eq!(table.entry(0, 1).0, *expected, "a change of table {number} is lost");
        *expected += 1;
        if table.change().set(0, 1, (*expected, 0)) {
            cache.note_dirty();
        }
    }

    /// Writes what has changed, or fails to.
    fn flush(&self, cache: &TableCache, succeeds: bool) {
        let parts = cache.take_dirty();
        std::thread::yield_now();
        if !succeeds {
            return cache.return_dirty(&parts);
        }
        for (table, part) in &parts {
            let word = u64::from_be_bytes(part.bytes[..8].try_into().unwrap());
            self.tables[(table.offset.bytes() / 0x10000 - 1) as usize].0.store(word, Release);
        }
    }
}

#[test]
fn readers_writers_flushes_and_evictions_at_the_same_time_lose_nothing() {
    let cache = TableCache::new(6);
    let tables = (0..Disk::TABLES).map(|_| Default::default()).collect();
    let disk = Disk { tables, reads: AtomicU64::new(0) };
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3_u64)
            .map(|seed| {
                let (cache, disk) = (&cache, &disk);
                scope.spawn(move || {
                    let mut state = seed + 1;
                    for _ in 0..6000 {
                        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(seed | 1);
                        disk.change(cache, (state >> 33) as usize % Disk::TABLES);
                    }
                })
            })
            .collect();
        for _ in 0..2 {
            scope.spawn(|| {
                let mut seen = [0; Disk::TABLES];
                for number in (0..Disk::TABLES).cycle().take_while(|_| !is_done.load(Relaxed)) {
                    let found = disk.find(&cache, number).entry(0, 1).0;
                    assert!(found >= seen[number], "table {number} has become older");
                    seen[number] = found;
                }
            });
        }
        scope.spawn(|| {
            for round in (0..8).cycle().take_while(|_| !is_done.load(Relaxed)) {
                disk.flush(&cache, round != 0);
            }
        });
        let results: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        is_done.store(true, Relaxed);
        assert!(results.iter().all(Result::is_ok));
    });
    // Whatever was dirty until now gives way to one more.
    disk.flush(&cache, true);
    cache.insert(Arc::new(Table::new(Disk::offset(Disk::TABLES), vec![0; 64])));
    for number in 0..Disk::TABLES {
        let expected = *disk.tables[number].1.lock();
        assert_eq!(disk.find(&cache, number).entry(0, 1).0, expected);
    }
    assert!(disk.reads.load(Relaxed) > Disk::TABLES as u64, "tables have given way");
}
