//! Files whose data bypasses the page cache behave like a row of bytes, with any alignment.

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Barrier;
use std::thread;

use imgfmt::storage::{FileStorage, MemoryStorage};
use imgfmt::{
    Access, CacheMode, Durability, ErrorKind, HostOffset, Locking, Speed, Storage, TryRead,
    ZeroMode,
};

use crate::common::Random;

/// Opens a file for direct I/O; `None` where the system really has none for it.
pub(crate) fn open_direct(path: &Path) -> Option<FileStorage> {
    match FileStorage::open_cached(path, Access::ReadWrite, Locking::Off, CacheMode::None) {
        Ok(storage) => Some(storage),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            let mut options = std::fs::OpenOptions::new();
            let opened = options.read(true).custom_flags(libc::O_DIRECT).open(path);
            assert!(opened.is_err(), "the system opens it: {error}");
            println!("skipped: no direct I/O in the directory for temporary files");
            None
        }
    }
}

/// What a file of `length` bytes of a pattern holds, with it as a file and in memory.
fn pair(path: &Path, length: usize) -> Option<(FileStorage, MemoryStorage)> {
    let bytes: Vec<u8> = (0..length).map(|place| (place % 251) as u8).collect();
    std::fs::write(path, &bytes).unwrap();
    Some((open_direct(path)?, MemoryStorage::from_bytes(&bytes)))
}

fn all_of(storage: &dyn Storage) -> Vec<u8> {
    let length = storage.len().unwrap() as usize;
    // Asks for more than there is, from and into memory of odd alignment.
    let mut found = vec![0xee; length + 701];
    let read = storage.read_at(HostOffset::new(0), &mut found[1..]).unwrap();
    assert_eq!(read, length);
    found[1..=length].to_vec()
}

fn compare(file: &FileStorage, path: &Path, model: &MemoryStorage, what: &str) {
    let expected = all_of(model);
    assert_eq!(file.len().unwrap(), expected.len() as u64, "{what}: length");
    assert!(all_of(file) == expected, "{what}: read past the page cache");
    assert!(std::fs::read(path).unwrap() == expected, "{what}: read through the page cache");
}

#[test]
fn writes_of_every_alignment_change_their_bytes_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    for length in [0, 700, 4096, 3 * 4096 + 777] {
        for durability in [Durability::Cached, Durability::Fua] {
            let Some((file, model)) = pair(&path, length) else { return };
            let unit = u64::from(file.direct_alignment().unwrap().offset);
            let edges = [0, 1, unit - 1, unit, unit + 1, 3 * unit, 4095, 4096, 3 * 4096 + 776];
            for offset in edges {
                for length in [1, unit - 1, unit, unit + 1, 2 * unit, 8191] {
                    let data = vec![(offset * 7 + length) as u8; length as usize];
                    let offset = HostOffset::new(offset);
                    file.write_at(offset, &data, durability).unwrap();
                    model.write_at(offset, &data, durability).unwrap();
                    let what = format!("{length} bytes at {offset}");
                    assert_eq!(file.len().unwrap(), model.len().unwrap(), "{what}");
                    assert!(all_of(&file) == all_of(&model), "{what}");
                }
            }
            compare(&file, &path, &model, "at the end");
        }
    }
}

#[test]
fn random_operations_do_what_they_do_to_a_row_of_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let Some((file, model)) = pair(&path, 1_300_777) else { return };
    let mut random = Random::new("direct I/O");
    for step in 0..600 {
        let length = model.len().unwrap();
        let alignment = [1, 512, 4096][random.below(3) as usize];
        let longest = [600, 10_000, 1_100_000][random.below(3) as usize];
        let offset = random.below(length + 5000) / alignment * alignment;
        let count = random.below(longest) / alignment * alignment + alignment;
        let (place, inside) = (HostOffset::new(offset), count.min(length.saturating_sub(offset)));
        match random.below(8) {
            0..=3 => {
                let data = random.bytes(count as usize + 16);
                let data = &data[random.below(16) as usize..][..count as usize];
                let durability = [Durability::Cached, Durability::Fua][random.below(2) as usize];
                file.write_at(place, data, durability).unwrap();
                model.write_at(place, data, durability).unwrap();
            }
            4 if inside > 0 => {
                let mode = [ZeroMode::MayUnmap, ZeroMode::KeepAllocated][random.below(2) as usize];
                file.write_zeroes(place, inside, mode, Speed::Any).unwrap();
                model.write_zeroes(place, inside, mode, Speed::Any).unwrap();
            }
            5 if step % 4 == 0 => {
                let length = length - random.below(length / 4) + random.below(300_000);
                file.set_len(length).unwrap();
                model.set_len(length).unwrap();
            }
            6 => file.sync().unwrap(),
            _ => {
                let (mut found, mut expected) = (vec![1; count as usize], vec![1; count as usize]);
                let read = file.read_at(place, &mut found).unwrap();
                assert_eq!(read, model.read_at(place, &mut expected).unwrap());
                assert!(found[..read] == expected[..read], "{count} bytes at {offset}");
                let tried = file.try_read_at(place, &mut found).unwrap();
                assert_eq!(tried, TryRead::WouldBlock);
            }
        }
    }
    compare(&file, &path, &model, "at the end");
}

/// Four threads write every fourth piece of some bytes each; a fifth one writes whole blocks before
/// them. Pieces share blocks, pages and the end of the file.
#[test]
fn threads_that_write_to_the_same_blocks_lose_nothing() {
    const PIECES: u64 = 400;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    for (start, piece) in [(0, 100), (4096, 515)] {
        std::fs::write(&path, vec![0xaa; start + 9000]).unwrap();
        let Some(file) = open_direct(&path) else { return };
        let start = start as u64;
        let barrier = Barrier::new(5);
        let byte = |index: u64| (index % 250) as u8 + 1;
        thread::scope(|scope| {
            for writer in 0..4 {
                let (file, barrier) = (&file, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for index in (writer..PIECES).step_by(4) {
                        let place = HostOffset::new(start + index * piece);
                        let data = vec![byte(index); piece as usize];
                        file.write_at(place, &data, Durability::Cached).unwrap();
                    }
                });
            }
            barrier.wait();
            for round in 0..u64::from(start > 0) * 200 {
                let data = vec![round as u8; start as usize];
                file.write_at(HostOffset::new(0), &data, Durability::Cached).unwrap();
            }
        });
        let found = std::fs::read(&path).unwrap();
        assert_eq!(found.len() as u64, start + PIECES * piece);
        assert!(all_of(&file) == found);
        assert!(found[..start as usize].iter().all(|byte| *byte == 199));
        for index in 0..PIECES {
            let place = (start + index * piece) as usize;
            let is_there = found[place..][..piece as usize].iter().all(|b| *b == byte(index));
            assert!(is_there, "piece {index} of {piece} bytes is lost");
        }
    }
}

#[test]
fn one_thread_overwrites_blocks_of_which_another_writes_the_next_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; 64 << 10]).unwrap();
    let Some(file) = open_direct(&path) else { return };
    let unit = file.direct_alignment().unwrap().offset as usize;
    for round in 1..150_u8 {
        let barrier = Barrier::new(3);
        let write = |offset: usize, length: usize| {
            barrier.wait();
            let place = HostOffset::new(offset as u64);
            file.write_at(place, &vec![round; length], Durability::Cached).unwrap();
        };
        thread::scope(|scope| {
            // The first half of a block; the second half and the next block; that block's end.
            scope.spawn(|| write(0, unit / 2));
            scope.spawn(|| write(unit / 2, unit / 2 + unit));
            write(2 * unit, unit);
        });
        let found = all_of(&file);
        assert!(found[..3 * unit].iter().all(|byte| *byte == round), "round {round}");
        assert!(found[3 * unit..].iter().all(|byte| *byte == 0), "round {round}");
    }
}

/// As files of /proc, which the kernel does not open for direct I/O.
#[test]
fn a_file_without_direct_io_is_refused_and_the_other_modes_are_named() {
    let path = Path::new("/proc/self/oom_score_adj");
    for cache in [CacheMode::None, CacheMode::DirectSync] {
        let opened = FileStorage::open_cached(path, Access::ReadOnly, Locking::Off, cache);
        let error = opened.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let said = error.to_string();
        assert!(said.contains("no direct I/O") && said.contains("writethrough"), "{said}");
    }
    FileStorage::open_cached(path, Access::ReadOnly, Locking::Off, CacheMode::Writethrough)
        .unwrap();
}
