//! Reading ahead: several packs at a time, and what becomes of those that fail.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::super::id::Key;
use super::super::map::Map;
use super::super::protocol::Moves;
use super::faults::place_in;
use super::*;
use crate::testing::{Fault, Seen, TestStore};

const BLOCK: usize = BLOCK_SIZE as usize;

/// A disk of several packs, and a backup of it.
async fn scene() -> (TestStore, Repository, Vec<u8>, Id) {
    let store = TestStore::start().unwrap();
    let repository = Repository::init(place_in(&store), None).await.unwrap();
    let disk = disk(2000, 5);
    let made = back_up(&repository, "vm1", &disk, None).await;
    store.take_seen();
    (store, repository, disk, made.id)
}

#[tokio::test(flavor = "multi_thread")]
async fn root_is_read_while_the_compactions_are_listed_and_after_the_pin() {
    let store = TestStore::start().unwrap();
    let repository = Repository::init(place_in(&store), None).await.unwrap();
    let made = back_up(&repository, "vm1", &disk(20, 5), None).await;
    store.take_seen();
    let is_root = |seen: &Seen| seen.method == "GET" && seen.key.contains("/backups/");
    let is_list = |seen: &Seen| seen.query.contains("repo%2Fmoved");
    store.fail(move |seen| match is_root(seen) || is_list(seen) {
        true => Fault::Held,
        false => Fault::None,
    });
    let reading = tokio::spawn(async move {
        let opened = repository.read(made.id, Damage::Refused).await;
        opened.unwrap().close().await;
    });
    let start = Instant::now();
    while store.held() < 2 {
        assert!(start.elapsed() < Duration::from_secs(10), "{} at a time", store.held());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    store.fail(|_| Fault::None);
    store.release();
    reading.await.unwrap();
    let seen = store.take_seen();
    assert_eq!(seen.len(), 4, "{seen:?}");
    assert!(seen[0].method == "PUT" && seen[0].key.contains("/pins/"), "{seen:?}");
    assert_eq!(seen[3].query, "delete", "{seen:?}");
}

/// The number of the pack that is read, if it is one.
fn pack(seen: &Seen) -> Option<u32> {
    let is_read = seen.method == "GET" && seen.key.contains("/packs/");
    is_read.then(|| seen.key.rsplit('/').next().unwrap().parse().unwrap())
}

/// The bytes that are read.
fn range(seen: &Seen) -> std::ops::Range<u64> {
    let range = seen.range.as_deref().and_then(|range| range.strip_prefix("bytes="));
    let (first, last) = range.and_then(|range| range.split_once('-')).unwrap();
    first.parse().unwrap()..last.parse::<u64>().unwrap() + 1
}

fn is_right(disk: &[u8], number: u64, block: Option<&Bytes>) -> bool {
    let start = number as usize * BLOCK;
    let expected = &disk[start..(start + BLOCK).min(disk.len())];
    block.map_or(expected.iter().all(|it| *it == 0), |it| it == expected)
}

/// Holds the reads of packs that come when it is known that the reader reads in order. The last
/// pack has the pages.
fn hold(store: &TestStore) {
    store.fail(|seen| match pack(seen) {
        Some(2..=4) => Fault::Held,
        _ => Fault::None,
    });
}

async fn until(is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not come to that");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Reads a disk in order, and compares it.
async fn read_all(backup: &OpenBackup, disk: &[u8]) {
    for number in 0..=2000 {
        let read = backup.blocks(number..number + 1).await.unwrap();
        assert!(is_right(disk, number, read[0].as_ref()), "block {number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_packs_are_on_their_way_for_one_reader_and_each_is_read_once() {
    let (store, repository, disk, id) = scene().await;
    let backup = repository.read(id, Damage::Refused).await.unwrap();
    hold(&store);
    let reader = tokio::spawn(async move {
        read_all(&backup, &disk).await;
        backup
    });
    until(|| store.held() >= 3).await;
    store.fail(|_| Fault::None);
    store.release();
    drop(reader.await.unwrap());
    let seen = store.take_seen();
    let mut ranges: Vec<_> =
        seen.iter().filter_map(|seen| Some((pack(seen)?, range(seen)))).collect();
    ranges.sort_unstable_by_key(|(pack, range)| (*pack, range.start));
    for pair in ranges.windows(2) {
        let is_apart = pair[0].0 != pair[1].0 || pair[0].1.end <= pair[1].1.start;
        assert!(is_apart, "{ranges:?}");
    }
    // The first reads are short, and the pages are read by others.
    let long = ranges.iter().filter(|(pack, _)| (3..=4).contains(pack)).count();
    assert!(long <= 2, "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reader_that_goes_away_ends_what_is_read_ahead() {
    let (store, repository, disk, id) = scene().await;
    let backup = repository.read(id, Damage::Refused).await.unwrap();
    hold(&store);
    let reader = tokio::spawn(async move { read_all(&backup, &disk).await });
    until(|| store.held() >= 3).await;
    reader.abort();
    assert!(reader.await.unwrap_err().is_cancelled());
    // The pin is removed, although requests are on their way.
    assert!(names(&repository, "pins").await.is_empty());
    let before = store.take_seen().len();
    assert!(before > 0);
    store.release();
    until(|| store.held() == 0).await;
    assert!(store.take_seen().iter().all(|seen| pack(seen).is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_pack_ahead_fails_its_own_blocks_and_no_others() {
    let (_store, repository, disk, id) = scene().await;
    let map = Map::open(&repository, &Moves::default(), id).await.unwrap();
    let mut lost = Vec::new();
    let mut victim = None;
    for (number, _) in map.root().pages().iter().enumerate() {
        let page = map.page(number).await.unwrap();
        for (block, stored) in page.blocks.iter().enumerate() {
            let Some(stored) = stored else { continue };
            if stored.pack.number == 3 {
                victim = Some(stored.pack);
                lost.push(number as u64 * 512 + block as u64);
            }
        }
    }
    repository.objects.delete(&Key::Pack(victim.unwrap()).to_string()).await.unwrap();
    let backup = repository.read(id, Damage::Refused).await.unwrap();
    for number in 0..=2000 {
        match backup.blocks(number..number + 1).await {
            Ok(read) => assert!(is_right(&disk, number, read[0].as_ref()), "block {number}"),
            Err(error) => {
                assert!(lost.contains(&number), "block {number}: {error}");
                assert!(error.to_string().contains("is missing"), "{error}");
            }
        }
    }
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let tell = Arc::clone(&told);
    let damage = Damage::Told(Arc::new(move |offset, _| tell.lock().unwrap().push(offset)));
    let backup = repository.read(id, damage).await.unwrap();
    for number in 0..=2000 {
        let read = backup.blocks(number..number + 1).await.unwrap();
        let is_lost = lost.contains(&number);
        assert!(is_right(&disk, number, read[0].as_ref()) != is_lost, "block {number}");
    }
    let mut told = told.lock().unwrap().clone();
    told.sort_unstable();
    assert_eq!(told, lost.iter().map(|block| block * BLOCK_SIZE).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_at_many_places_get_what_they_ask_for_from_a_store_that_fails_at_times() {
    let (store, repository, disk, id) = scene().await;
    let backup = Arc::new(repository.read(id, Damage::Refused).await.unwrap());
    let count = AtomicUsize::new(0);
    store.fail(move |_| match count.fetch_add(1, Ordering::Relaxed) % 5 {
        1 => Fault::Status(503),
        3 => Fault::Cut(100_000),
        _ => Fault::None,
    });
    let mut state = 20_261_128_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % below
    };
    let disk = Arc::new(disk);
    let mut readers = Vec::new();
    for _ in 0..6 {
        // Some read in order, from anywhere.
        let reads: Vec<_> = (0..12).map(|_| (random(1900), random(8) + 1, random(40))).collect();
        let (backup, disk) = (Arc::clone(&backup), Arc::clone(&disk));
        readers.push(tokio::spawn(async move {
            for (first, length, times) in reads {
                for time in 0..times {
                    let start = (first + time * length).min(1990);
                    let read = backup.blocks(start..start + length).await.unwrap();
                    for (number, block) in (start..).zip(&read) {
                        assert!(is_right(&disk, number, block.as_ref()), "block {number}");
                    }
                }
            }
        }));
    }
    for reader in readers {
        reader.await.unwrap();
    }
}
