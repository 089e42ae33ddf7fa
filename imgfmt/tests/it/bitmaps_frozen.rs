//! Checkpoints: while bits of a bitmap are frozen it is not taken for complete, and whatever
//! happens meanwhile they are back when the image is next opened for writing.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use imgfmt::testing::Loss;
use imgfmt::{
    Access, BitmapChange, BitmapState, CreateOptions, Durability, ErrorKind, Format, Image,
    OpenOptions, Recording, Repair, frozen_bitmap_name,
};

use crate::common::bitmaps::dirty;
use crate::common::{Random, at, qemu, range};
use crate::judge::subjects::{OnTrial, Start, Subject, Tolerance, options, qemu_check, rounds};

pub(crate) const SIZE: u64 = 4 << 20;
pub(crate) const PART: u64 = 64 << 10;

pub(crate) fn disk(directory: &Path) -> PathBuf {
    let path = directory.join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    let image = writable(&path);
    image.add_bitmap("daily", PART, Recording::Enabled).unwrap();
    image.close().unwrap();
    path
}

pub(crate) fn writable(path: &Path) -> Image {
    Image::open(path, &OpenOptions::new().access(Access::ReadWrite)).unwrap()
}

fn read_only(path: &Path) -> Image {
    Image::open(path, &OpenOptions::new()).unwrap()
}

pub(crate) fn write(image: &Image, part: u64) {
    image.write_at(at(part * PART), &[7; 512], Durability::Cached).unwrap();
}

fn change(name: &str, change: fn(String) -> BitmapChange) -> BitmapChange {
    change(name.to_owned())
}

fn freeze(image: &Image, name: &str) {
    image
        .bitmap_transaction(&[change(name, |name| BitmapChange::Freeze { name, backup: None })])
        .unwrap();
}

fn state(image: &Image, name: &str) -> BitmapState {
    let all = image.bitmaps();
    all.into_iter().find(|bitmap| bitmap.name == name).unwrap().state
}

fn incomplete() -> BitmapState {
    BitmapState::Incomplete { frozen: frozen_bitmap_name("daily"), problem: None }
}

pub(crate) fn parts(parts: &[u64]) -> Vec<(u64, u64)> {
    parts.iter().map(|part| (part * PART, PART)).collect()
}

/// An image that a killed process has left with frozen bits of 1 and 5.
fn left(directory: &Path) -> PathBuf {
    let path = disk(directory);
    let image = writable(&path);
    for part in [1, 5] {
        write(&image, part);
        freeze(&image, "daily");
    }
    let left = directory.join("left.qcow2");
    std::fs::copy(&path, &left).unwrap();
    left
}

#[test]
fn a_frozen_bitmap_is_incomplete_until_its_bits_are_dropped_or_thawed() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let image = writable(&path);
    write(&image, 1);
    freeze(&image, "daily");
    write(&image, 5);
    assert_eq!(state(&image, "daily"), incomplete());
    let whole = range(0, SIZE);
    for error in [
        image.dirty_extents("daily", whole, 9).unwrap_err(),
        image.dirty_bits("daily").unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("'daily.checkpoint'"), "{error}");
    }
    assert_eq!(dirty(&image, "daily.checkpoint"), parts(&[1]));

    // A second one takes the frozen bits along.
    freeze(&image, "daily");
    write(&image, 7);
    assert_eq!(dirty(&image, "daily.checkpoint"), parts(&[1, 5]));
    image.bitmap_transaction(&[change("daily", |name| BitmapChange::Thaw { name })]).unwrap();
    assert_eq!(dirty(&image, "daily"), parts(&[1, 5, 7]));

    freeze(&image, "daily");
    write(&image, 9);
    image.bitmap_transaction(&[change("daily", |name| BitmapChange::DropFrozen { name })]).unwrap();
    assert_eq!(dirty(&image, "daily"), parts(&[9]));
    for wrong in [
        change("daily", |name| BitmapChange::Thaw { name }),
        change("daily", |name| BitmapChange::DropFrozen { name }),
        change("nobody", |name| BitmapChange::Freeze { name, backup: None }),
    ] {
        let error = image.bitmap_transaction(&[wrong]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    }
    image.close().unwrap();
}

#[test]
fn opening_for_writing_puts_frozen_bits_back_and_opening_for_reading_tells() {
    let directory = tempfile::tempdir().unwrap();
    let path = left(directory.path());
    let before = std::fs::read(&path).unwrap();
    let image = read_only(&path);
    assert_eq!(state(&image, "daily"), incomplete());
    assert!(image.dirty_bits("daily").is_err());
    assert_eq!(image.bitmaps_of_chain()[0].state, incomplete());
    drop(image);
    assert!(std::fs::read(&path).unwrap() == before, "who reads changes nothing");

    // A backing file is only read, too.
    let overlay = directory.path().join("overlay.qcow2");
    Image::create(&overlay, &CreateOptions::overlay("left.qcow2", Format::Qcow2)).unwrap();
    let image = writable(&overlay);
    assert!(image.dirty_bits("daily").is_err());
    image.close().unwrap();

    let image = writable(&path);
    assert_eq!(image.bitmap_durability().thawed, ["daily"]);
    assert_eq!(dirty(&image, "daily"), parts(&[1, 5]));
    assert_eq!(image.bitmaps().len(), 1);
    image.close().unwrap();
    let image = read_only(&path);
    assert_eq!(dirty(&image, "daily"), parts(&[1, 5]));
    assert_eq!(image.bitmap_durability().thawed, [""; 0]);
}

#[test]
fn a_clean_close_puts_frozen_bits_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let image = writable(&path);
    write(&image, 1);
    freeze(&image, "daily");
    write(&image, 5);
    image.close().unwrap();
    let image = read_only(&path);
    assert_eq!(image.bitmaps().len(), 1);
    assert_eq!(dirty(&image, "daily"), parts(&[1, 5]));
    let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
}

#[test]
fn no_change_of_bitmaps_loses_frozen_bits() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let image = writable(&path);
    image.add_bitmap("other", PART, Recording::Disabled).unwrap();
    write(&image, 1);
    freeze(&image, "daily");
    write(&image, 5);
    for lossy in [
        change("daily.checkpoint", |name| BitmapChange::Remove { name }),
        change("daily.checkpoint", |name| BitmapChange::Clear { name }),
        change("daily.checkpoint", |name| BitmapChange::Enable { name }),
        BitmapChange::Merge { into: "other".into(), from: "daily".into() },
    ] {
        let error = image.bitmap_transaction(std::slice::from_ref(&lossy)).unwrap_err();
        assert!(error.to_string().contains("checkpoint"), "{lossy:?}: {error}");
        assert_eq!(state(&image, "daily"), incomplete(), "{lossy:?}");
    }
    // Without the bitmap that lacks them nobody is misled.
    let gone =
        ["daily", "daily.checkpoint"].map(|it| change(it, |name| BitmapChange::Remove { name }));
    image.bitmap_transaction(&gone).unwrap();
    image.close().unwrap();
}

/// Marks every bitmap of that name in the file as in use.
fn mark_in_use(path: &Path, name: &str) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let bytes = std::fs::read(path).unwrap();
    let name = name.as_bytes();
    let found: Vec<usize> = (24..bytes.len() - name.len())
        .filter(|at| bytes[*at..].starts_with(name))
        .filter(|at| bytes[at - 6..at - 4] == [0, name.len() as u8])
        .collect();
    assert!(!found.is_empty());
    for at in found {
        file.write_all_at(&[bytes[at - 9] | 1], at as u64 - 9).unwrap();
    }
}

#[test]
fn frozen_bits_that_cannot_be_relied_on_make_everything_dirty_after_a_repair() {
    let directory = tempfile::tempdir().unwrap();
    let path = left(directory.path());
    mark_in_use(&path, "daily.checkpoint");
    let image = writable(&path);
    assert_eq!(image.bitmap_durability().thawed, [""; 0]);
    let found = state(&image, "daily");
    assert!(matches!(found, BitmapState::Incomplete { problem: Some(_), .. }), "{found:?}");
    let remove = change("daily.checkpoint", |name| BitmapChange::Remove { name });
    assert!(image.bitmap_transaction(&[remove]).is_err());
    let repair = change("daily.checkpoint", |name| BitmapChange::Repair { name });
    image.bitmap_transaction(&[repair]).unwrap();
    assert_eq!(image.thaw_bitmaps().unwrap(), ["daily"]);
    assert_eq!(dirty(&image, "daily"), [(0, SIZE)]);
    image.close().unwrap();
}

#[test]
fn a_repair_of_the_image_does_not_make_a_bitmap_look_complete() {
    let directory = tempfile::tempdir().unwrap();
    let path = left(directory.path());
    // The table of the frozen bits is beyond the end of the file.
    let bytes = std::fs::read(&path).unwrap();
    let name = b"daily.checkpoint";
    let entry = bytes.windows(name.len()).rposition(|window| window == name).unwrap() - 24;
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&(1u64 << 40).to_be_bytes(), entry as u64).unwrap();
    Image::check_file(&path, &OpenOptions::new(), Repair::All).unwrap();
    let image = writable(&path);
    assert_eq!(dirty(&image, "daily"), [(0, SIZE)]);
    image.close().unwrap();
}

#[test]
fn a_repair_that_drops_a_damaged_bitmap_leaves_an_image_that_can_be_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let bytes = std::fs::read(&path).unwrap();
    let entry = bytes.windows(5).rposition(|window| window == b"daily").unwrap() - 24;
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&(1u64 << 40).to_be_bytes(), entry as u64).unwrap();
    let report = Image::check_file(&path, &OpenOptions::new(), Repair::All).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    let image = writable(&path);
    assert_eq!(image.bitmaps(), []);
    write(&image, 3);
    image.close().unwrap();
    let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
}

#[test]
fn a_bitmap_waits_for_the_frozen_bits_of_its_frozen_bits() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let image = writable(&path);
    for (part, name) in [(1, "daily.checkpoint.checkpoint"), (3, "daily.checkpoint")] {
        image.add_bitmap(name, PART, Recording::Enabled).unwrap();
        write(&image, part);
        let disable = change(name, |name| BitmapChange::Disable { name });
        image.bitmap_transaction(&[disable]).unwrap();
    }
    image.close().unwrap();
    let image = writable(&path);
    assert_eq!(image.bitmaps().len(), 1);
    assert_eq!(dirty(&image, "daily"), parts(&[1, 3]));
    image.close().unwrap();
}

#[test]
fn more_bitmaps_that_wait_than_anybody_has_cost_no_time_but_are_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    let image = writable(&path);
    let add = |name: String, recording| BitmapChange::Add { name, granularity: PART, recording };
    let names = (0..300).flat_map(|number| {
        let name = number.to_string();
        [add(frozen_bitmap_name(&name), Recording::Disabled), add(name, Recording::Disabled)]
    });
    image.bitmap_transaction(&names.collect::<Vec<_>>()).unwrap();
    image.close().unwrap();
    let image = writable(&path);
    assert!(image.bitmap_durability().thaw_failure.is_some());
    assert!(matches!(state(&image, "0"), BitmapState::Incomplete { .. }));
    image.close().unwrap();
}

#[test]
fn whatever_instant_a_crash_comes_at_a_bitmap_that_looks_complete_is() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash in a checkpoint");
    for options_of in ["", "cluster_size=512"] {
        let directory = tempfile::tempdir().unwrap();
        let made = Subject::new(options_of, Start::Used).make(directory.path(), SIZE, &mut random);
        let trial = OnTrial::new(&made);
        let image = trial.open().unwrap();
        image.add_bitmap("daily", PART, Recording::Enabled).unwrap();
        // What has to be dirty at least, from a position on.
        let mut history: Vec<(usize, Vec<u64>)> = vec![(trial.recorder.position(), Vec::new())];
        let (mut old, mut new) = (Vec::new(), Vec::new());
        for _ in 0..12 {
            let part = random.below(SIZE / PART);
            write(&image, part);
            old.push(part);
            history.push((trial.recorder.position(), old.clone()));
            freeze(&image, "daily");
            let part = random.below(SIZE / PART);
            write(&image, part);
            new.push(part);
            let all = [&old[..], &new].concat();
            history.push((trial.recorder.position(), all.clone()));
            let (end, left): (fn(String) -> BitmapChange, _) = match random.below(2) {
                0 => (|name| BitmapChange::DropFrozen { name }, new.clone()),
                _ => (|name| BitmapChange::Thaw { name }, all),
            };
            image.bitmap_transaction(&[change("daily", end)]).unwrap();
            (old, new) = (left, Vec::new());
            history.push((trial.recorder.position(), old.clone()));
        }
        let end = trial.recorder.position();
        let first = history[0].0;
        let mut positions: Vec<usize> = history.iter().map(|(done, _)| *done).collect();
        let random_ones = 0..rounds("IMGFMT_CRASH_ROUNDS", 40);
        positions
            .extend(random_ones.map(|_| first + random.below((end - first) as u64 + 1) as usize));
        let mut looked_at = 0;
        for position in positions {
            let loss = Loss::ALL[random.below(4) as usize];
            trial.crash(&made, position, loss, &mut random);
            let what = format!("{loss:?} lost after {position} of {end}");
            qemu_check(&made.path, Tolerance::Leaks, &what);
            let next = history.iter().position(|(done, _)| *done >= position).unwrap();
            let (before, after) = (&history[next.saturating_sub(1)].1, &history[next].1);
            let image = Image::open(&made.path, &options()).unwrap();
            if !matches!(state(&image, "daily"), BitmapState::Consistent { .. }) {
                continue;
            }
            looked_at += 1;
            let found = dirty(&image, "daily");
            let covers = |part: &u64| {
                let at = part * PART;
                found.iter().any(|(start, length)| (*start..start + length).contains(&at))
            };
            let mut needed = before.iter().filter(|part| after.contains(part));
            assert!(needed.all(covers), "{what}: {before:?} to {after:?}, found {found:?}");
            image.close().unwrap();
        }
        assert!(looked_at > 0, "after a change of the list it is sound");
    }
}
