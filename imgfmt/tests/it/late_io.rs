//! Reads and writes that take their time are not overtaken by those who reuse their clusters.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::testing::{Call, FailingStorage, Fault};
use imgfmt::{
    Access, Content, Durability, Format, Image, Mapping, OpenOptions, Speed, Storage, TryRead,
    ZeroMode,
};

use crate::common::{Random, at, range, wait_until};
use crate::handmade::Handmade;

const CLUSTER: u64 = 4096;
/// Guest cluster 0 is stored here.
const VICTIM: u64 = 5 * CLUSTER;
const CACHED: Durability = Durability::Cached;

fn open() -> (Arc<FailingStorage>, Image) {
    let mut image = Handmade::new(12, 128 * CLUSTER);
    image.add_data(0, 7);
    let storage = FailingStorage::new(Arc::new(MemoryStorage::from_bytes(&image.bytes)));
    let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
    let disk = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
    (storage, disk)
}

/// Writes many new clusters, which would take the place of any that is free.
fn fill(disk: &Image) {
    for cluster in 8..64 {
        disk.write_at(at(cluster * CLUSTER), &[9; CLUSTER as usize], CACHED).unwrap();
    }
}

fn check_filled(disk: &Image) {
    for cluster in 8..64 {
        let mut bytes = [0; CLUSTER as usize];
        disk.read_at(at(cluster * CLUSTER), &mut bytes).unwrap();
        assert_eq!(bytes, [9; CLUSTER as usize], "cluster {cluster}");
    }
}

fn read_mapped(mapping: Mapping<'_>) -> Vec<u8> {
    let Content::File(span) = mapping.content else { panic!("{mapping:?}") };
    let mut bytes = vec![0; mapping.range.length() as usize];
    span.storage.read_exact_at(span.offset, &mut bytes).unwrap();
    bytes
}

#[test]
fn what_a_lease_maps_is_not_given_to_others() {
    let (_, disk) = open();
    let lease = disk.map_read(range(0, CLUSTER)).unwrap();
    disk.discard(range(0, CLUSTER), CACHED).unwrap();
    for _ in 0..3 {
        disk.flush().unwrap();
        fill(&disk);
    }
    assert_eq!(read_mapped(lease.mappings().next().unwrap()), [7; CLUSTER as usize]);
    drop(lease);
    disk.flush().unwrap();
    // Now the place is free: it is given away before the file grows.
    disk.write_at(at(100 * CLUSTER), &[5; CLUSTER as usize], CACHED).unwrap();
    let lease = disk.map_read(range(100 * CLUSTER, CLUSTER)).unwrap();
    let Content::File(span) = lease.mappings().next().unwrap().content else { panic!("no data") };
    assert_eq!(span.offset.bytes(), VICTIM);
}

#[test]
fn a_lease_protects_also_what_is_freed_long_after_it_was_taken() {
    let (storage, disk) = open();
    let lease = disk.map_read(range(0, CLUSTER)).unwrap();
    // Flushes that free nothing, and one that fails, do not make it forgotten.
    disk.write_at(at(2 * CLUSTER), &[1; 512], CACHED).unwrap();
    disk.flush().unwrap();
    disk.write_at(at(4 * CLUSTER), &[1; 512], CACHED).unwrap();
    storage.set_fault(Some(Fault { calls: 0..u64::MAX, code: 5 }));
    disk.flush().unwrap_err();
    storage.set_fault(None);
    disk.discard(range(0, CLUSTER), CACHED).unwrap();
    for _ in 0..3 {
        disk.flush().unwrap();
        fill(&disk);
    }
    assert_eq!(read_mapped(lease.mappings().next().unwrap()), [7; CLUSTER as usize]);
}

#[test]
fn a_write_in_place_that_is_late_does_not_hit_another_cluster() {
    let (storage, disk) = open();
    storage.hold(Call::Write, VICTIM..VICTIM + CLUSTER);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| disk.write_at(at(512), &[1; 512], CACHED));
        wait_until("the write", || storage.held() == 1);
        disk.discard(range(0, CLUSTER), CACHED).unwrap();
        for _ in 0..3 {
            disk.flush().unwrap();
        }
        // Should the place be given away, this would wait for ever: it is held.
        fill(&disk);
        storage.release();
        writer.join().unwrap().unwrap();
    });
    check_filled(&disk);
}

#[test]
fn a_hole_that_is_punched_late_does_not_hit_another_cluster() {
    let (storage, disk) = open();
    storage.hold(Call::PunchHole, 0..u64::MAX);
    disk.discard(range(0, CLUSTER), CACHED).unwrap();
    std::thread::scope(|scope| {
        let flusher = scope.spawn(|| disk.flush());
        wait_until("the hole", || storage.held() == 1);
        let filler = scope.spawn(|| fill(&disk));
        // The filler may or may not have to wait for the hole; both are right.
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        storage.release();
        flusher.join().unwrap().unwrap();
        filler.join().unwrap();
    });
    disk.flush().unwrap();
    check_filled(&disk);
}

#[test]
fn a_slow_write_does_not_keep_others_from_reading_and_writing_elsewhere() {
    let (storage, disk) = open();
    storage.hold(Call::Write, VICTIM..VICTIM + CLUSTER);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| disk.write_at(at(0), &[1; 512], CACHED));
        wait_until("the write", || storage.held() == 1);
        fill(&disk);
        check_filled(&disk);
        disk.write_zeroes(range(70 * CLUSTER, CLUSTER), ZeroMode::MayUnmap, Speed::Any, CACHED)
            .unwrap();
        let mut bytes = [0; 512];
        disk.read_at(at(1024), &mut bytes).unwrap();
        assert_eq!(bytes, [7; 512]);
        storage.release();
        writer.join().unwrap().unwrap();
    });
}

#[test]
fn an_allocating_write_that_is_late_shows_the_old_content_and_does_not_block_other_clusters() {
    let (storage, disk) = open();
    let end = storage.len().unwrap();
    storage.hold(Call::Write, end..end + CLUSTER);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| disk.write_at(at(CLUSTER), &[1; CLUSTER as usize], CACHED));
        wait_until("the write", || storage.held() == 1);
        let mut bytes = [3; CLUSTER as usize];
        disk.read_at(at(CLUSTER), &mut bytes).unwrap();
        assert_eq!(bytes, [0; CLUSTER as usize], "data is shown that is not there yet");
        fill(&disk);
        check_filled(&disk);
        storage.release();
        writer.join().unwrap().unwrap();
        disk.read_at(at(CLUSTER), &mut bytes).unwrap();
        assert_eq!(bytes, [1; CLUSTER as usize]);
    });
}

/// Bytes that tell where on the disk they belong.
fn tagged(offset: u64) -> Vec<u8> {
    (offset / 512 + 1).to_be_bytes().repeat(512 / 8)
}

fn check_tags(offset: u64, bytes: &[u8], how: &str) {
    for (sector, bytes) in (offset / 512..).zip(bytes.chunks(512)) {
        let is_own = bytes == tagged(sector * 512) || bytes.iter().all(|byte| *byte == 0);
        assert!(is_own, "{how}: sector {sector} shows {:?}", &bytes[..8]);
    }
}

fn read_somewhere(disk: &Image, random: &mut Random) {
    let offset = random.below(disk.size() / 512) * 512;
    let length = ((random.below(40) + 1) * 512).min(disk.size() - offset);
    let mut bytes = vec![0; length as usize];
    match random.below(3) {
        0 => {
            disk.read_at(at(offset), &mut bytes).unwrap();
            check_tags(offset, &bytes, "read");
        }
        1 => {
            if disk.try_read_at(at(offset), &mut bytes).unwrap() == TryRead::Complete {
                check_tags(offset, &bytes, "read without blocking");
            }
        }
        _ => {
            let lease = disk.map_read(range(offset, length)).unwrap();
            std::thread::yield_now();
            for mapping in lease.mappings() {
                if let Content::File(_) = mapping.content {
                    let start = mapping.range.offset().bytes();
                    check_tags(start, &read_mapped(mapping), "read by a lease");
                }
            }
        }
    }
}

fn change_somewhere(disk: &Image, random: &mut Random) {
    let offset = random.below(disk.size() / 512) * 512;
    let length = ((random.below(40) + 1) * 512).min(disk.size() - offset);
    match random.below(8) {
        0..=3 => {
            let data: Vec<u8> = (offset..offset + length).step_by(512).flat_map(tagged).collect();
            disk.write_at(at(offset), &data, CACHED).unwrap();
        }
        4 => {
            let mode = ZeroMode::MayUnmap;
            disk.write_zeroes(range(offset, length), mode, Speed::Any, CACHED).unwrap();
        }
        5 | 6 => disk.discard(range(offset, length), CACHED).unwrap(),
        _ => disk.flush().unwrap(),
    }
}

#[test]
fn readers_never_see_another_place_while_writers_move_everything() {
    let base = Random::new("readers and writers").next();
    for extended in [false, true] {
        let bits = if extended { 14 } else { 12 };
        let image = Handmade::new(bits, 100 << bits);
        let image = if extended { image.extended() } else { image };
        let storage = Arc::new(MemoryStorage::from_bytes(&image.bytes));
        let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
        let disk = Image::from_storage(storage, &options.metadata_cache_bytes(0)).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let disk = &disk;
                scope.spawn(move || {
                    let mut random = Random::seeded(base ^ (thread << 32 | 1));
                    for _ in 0..1500 {
                        match thread {
                            0 | 1 => change_somewhere(disk, &mut random),
                            _ => read_somewhere(disk, &mut random),
                        }
                    }
                });
            }
        });
        let mut bytes = vec![0; disk.size() as usize];
        disk.read_at(at(0), &mut bytes).unwrap();
        check_tags(0, &bytes, "at the end");
    }
}

#[test]
fn a_file_that_grows_for_one_write_does_not_lose_what_another_wrote_behind() {
    const LARGE: u64 = 1 << 20;
    let image = Handmade::new(20, 16 * LARGE);
    let storage = FailingStorage::new(Arc::new(MemoryStorage::from_bytes(&image.bytes)));
    let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
    let disk = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
    disk.write_at(at(3 * LARGE), &[3; 4096], CACHED).unwrap();
    // A write that fails leaves a free place behind the end of the file: what is written there
    // later must be zeroed around, and the file grow for that.
    storage.set_fault(Some(Fault { calls: 0..u64::MAX, code: 28 }));
    disk.write_at(at(0), &[1; 4096], CACHED).unwrap_err();
    storage.set_fault(None);
    storage.hold(Call::SetLength, 0..u64::MAX);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| disk.write_at(at(8192), &[1; 4096], CACHED));
        wait_until("the first write", || first.is_finished() || storage.held() == 1);
        disk.write_at(at(5 * LARGE), &[5; LARGE as usize], CACHED).unwrap();
        storage.release();
        first.join().unwrap().unwrap();
    });
    let mut bytes = vec![0; LARGE as usize];
    disk.read_at(at(5 * LARGE), &mut bytes).unwrap();
    assert!(bytes == [5; LARGE as usize]);
}
