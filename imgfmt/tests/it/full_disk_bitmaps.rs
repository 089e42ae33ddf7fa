//! What finds no space on a full disk costs no bitmap, and a size that could not change stays.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use imgfmt::testing::Loss;
use imgfmt::{
    BitmapChange, BitmapDurability, BitmapState, Durability, ErrorKind, Image, Recording, Shrink,
};

use crate::common::bitmaps::dirty;
use crate::common::{Random, at, qemu, range, run, text};
use crate::full_disk::FullDisk;
use crate::judge::joint::{BOOT, Files, Joint};
use crate::judge::subjects::{Start, Subject, Tolerance, qemu_check};

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 4096;
const CACHED: Durability = Durability::Cached;
const NAMES: [&str; 2] = ["daily", "new"];

type Change = fn(&mut Image) -> imgfmt::Result<()>;

/// When a change sets bits.
#[derive(Clone, Copy, PartialEq)]
enum Sets {
    Never,
    IfMade,
    Always,
}

/// What may be done to the image.
const CHANGES: [(&str, Change, Sets); 7] = [
    ("larger with data, or not at all", larger_with_data, Sets::IfMade),
    ("larger", |image| image.resize(64 * SIZE, Shrink::Refuse), Sets::Never),
    (
        "larger by a part of a cluster",
        |image| image.resize(SIZE + 512, Shrink::Refuse),
        Sets::Never,
    ),
    ("smaller", |image| image.resize(SIZE / 2, Shrink::Allow), Sets::Never),
    ("apply", |image| image.apply_snapshot("same size"), Sets::Never),
    ("apply another size", |image| image.apply_snapshot("smaller"), Sets::Never),
    ("write", |image| image.write_at(at(4096), &[7; 64 << 10], CACHED), Sets::Always),
];

/// Makes the disk smaller again where the added part cannot be filled.
fn larger_with_data(image: &mut Image) -> imgfmt::Result<()> {
    let added = range(2 * SIZE, 64 << 10);
    image.resize(added.end().bytes(), Shrink::Refuse)?;
    image.write_at(added.offset(), &[0; 64 << 10], CACHED).inspect_err(|_| {
        image.discard(added, CACHED).unwrap();
        image.flush().unwrap();
        image.resize(SIZE, Shrink::Allow).unwrap();
    })
}

/// An image with two snapshots, a bitmap with bits, and one without.
fn made(directory: &Path) -> Files {
    let mut random = Random::new("bitmaps on a full disk");
    let made = Subject::new("cluster_size=4096", Start::Used).make(directory, SIZE, &mut random);
    let files = Files { image: made.bytes, sidecar: None };
    let joint = Joint::new(&files, BitmapDurability::CleanClose, BOOT);
    let mut image = joint.open().unwrap();
    image.resize(SIZE - 8192, Shrink::Allow).unwrap();
    image.create_snapshot("smaller").unwrap();
    image.resize(SIZE, Shrink::Refuse).unwrap();
    image.create_snapshot("same size").unwrap();
    for name in NAMES {
        let recording = Recording::Enabled;
        let add = BitmapChange::Add { name: name.into(), granularity: 4096, recording };
        image.bitmap_transaction(&[add]).unwrap();
        if name != NAMES[1] {
            (0..40).for_each(|n| image.write_at(at(n * 20480), &[n as u8; 4096], CACHED).unwrap());
        }
    }
    image.close().unwrap();
    joint.crash(joint.recorder.position(), Loss::Nothing, &mut random)
}

fn all_of(image: &Image) -> Vec<u8> {
    let mut found = vec![0xee; image.size() as usize];
    image.read_at(at(0), &mut found).unwrap();
    found
}

fn bits(image: &Image) -> Vec<Vec<(u64, u64)>> {
    NAMES.iter().map(|name| dirty(image, name)).collect()
}

fn is_consistent(state: &BitmapState) -> bool {
    matches!(state, BitmapState::Consistent { .. })
}

/// Whether every dirty part of `fewer` is dirty in `more`.
fn covers(more: &[Vec<(u64, u64)>], fewer: &[Vec<(u64, u64)>]) -> bool {
    more.iter().zip(fewer).all(|(more, fewer)| {
        let is_dirty = |(start, length): &(u64, u64)| {
            more.iter().any(|(from, long)| from <= start && start + length <= from + long)
        };
        fewer.iter().all(is_dirty)
    })
}

/// Makes the change where the file can grow by `room` bytes; returns whether it succeeded.
fn change_with_room(
    files: &Files,
    (durability, room): (BitmapDurability, u64),
    (what, change, sets): (&str, Change, Sets),
    path: &Path,
) -> bool {
    let what = format!("{what}, {durability:?}, room for {room} bytes");
    let joint = Joint::new(files, durability, BOOT);
    let limit = Arc::new(AtomicU64::new(files.image.len() as u64 + room));
    let open =
        || joint.open_through(|inner| Arc::new(FullDisk { inner, limit: Arc::clone(&limit) }) as _);
    let mut image = open().unwrap();
    let (size, content, before) = (image.size(), all_of(&image), bits(&image));
    let changed = change(&mut image);
    let writes = sets == Sets::Always || (sets == Sets::IfMade && changed.is_ok());
    if let Err(error) = &changed {
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}: {error}");
        assert_eq!(image.size(), size, "{what}");
        assert!(writes || bits(&image) == before, "{what}: bits have changed");
        assert!(writes || all_of(&image) == content, "{what}: the content has changed");
    }
    let (size, content, after) = (image.size(), all_of(&image), bits(&image));
    let begun = joint.recorder.position();
    let closed = image.close();
    let end = joint.recorder.position();
    let is_kept = durability != BitmapDurability::CleanClose && writes;
    match closed {
        Ok(()) => {}
        // A cluster of bits has no place, and the sidecar has them.
        Err(error) => assert!(is_kept && error.kind() == ErrorKind::NoSpace, "{what}: {error}"),
    }
    let mut random = Random::seeded(room);
    // Killed at any time, a bitmap is in use or has all bits.
    for position in begun..end {
        let killed =
            Joint::new(&joint.crash(position, Loss::Nothing, &mut random), durability, BOOT);
        let image = killed.open().unwrap();
        let is_ready = image.bitmaps().iter().all(|bitmap| is_consistent(&bitmap.state));
        assert!(!is_ready || covers(&bits(&image), &after), "{what}: killed at {position}");
        assert!(is_ready || durability == BitmapDurability::CleanClose, "{what}: {position}");
    }
    let files = joint.crash(end, Loss::Nothing, &mut random);
    files.put_down(path, BOOT);
    qemu_check(path, Tolerance::Leaks, &what);
    if !is_kept {
        let said = run("qemu-img", &["info", text(path)]);
        assert!(!said.contains("in-use"), "{what}: {said}");
    }
    let image = open().unwrap();
    assert_eq!(image.size(), size, "{what}");
    assert!(all_of(&image) == content, "{what}: another content");
    let found = bits(&image);
    assert!(covers(&found, &after), "{what}: a bit is lost: {found:?}");
    assert!(writes || found == after, "{what}: bits were set: {found:?}");
    drop(image);
    limit.store(u64::MAX, Relaxed);
    let mut image = open().unwrap();
    change(&mut image).unwrap();
    image.close().unwrap();
    changed.is_ok()
}

#[test]
fn a_change_that_finds_no_space_keeps_size_content_and_bitmaps_and_can_be_repeated() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let files = made(directory.path());
    let path = directory.path().join("found.qcow2");
    for durability in [BitmapDurability::CleanClose, BitmapDurability::PowerLoss] {
        for change in CHANGES {
            let mut rooms = (0..).map(|count| count * CLUSTER);
            let first = |room| change_with_room(&files, (durability, room), change, &path);
            let failed = rooms.by_ref().take_while(|room| !first(*room)).count();
            println!("{}: {failed} without enough room", change.0);
        }
    }
}
