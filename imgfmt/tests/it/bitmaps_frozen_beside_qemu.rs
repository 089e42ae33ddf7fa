//! QEMU knows no frozen bits. Whatever is left of a checkpoint, a bitmap that QEMU takes for
//! complete contains them.

use std::path::{Path, PathBuf};

use imgfmt::testing::Loss;
use imgfmt::{
    Access, BitmapChange, BitmapDurability, BitmapState, Image, OpenOptions, Recording, Shrink,
    frozen_bitmap_name,
};

use crate::bitmaps_frozen::{PART, SIZE, disk, parts, writable, write};
use crate::common::bitmaps::dirty;
use crate::common::{Random, qemu, run, text};
use crate::judge::subjects::{OnTrial, Start, Subject, Tolerance, qemu_check};

fn change(image: &Image, change: BitmapChange) {
    image.bitmap_transaction(&[change]).unwrap();
}

fn freeze(image: &Image) {
    change(image, BitmapChange::Freeze { name: "daily".into(), backup: None });
}

/// A copy of the image as a process that is killed now leaves it, without a file beside it.
fn killed(path: &Path) -> PathBuf {
    let copy = path.with_extension("killed");
    std::fs::copy(path, &copy).unwrap();
    copy
}

/// Whether QEMU takes the bitmap for one that was not stored properly.
fn is_refused_by_qemu(path: &Path) -> bool {
    let info = run("qemu-img", &["info", "--output=json", text(path)]);
    let info: String = info.split_whitespace().collect();
    let named = info.split("\"name\":\"daily\"").next().unwrap();
    named.rsplit('{').next().unwrap().contains("in-use")
}

#[test]
fn qemu_sees_all_bits_of_a_process_killed_right_after_a_freeze_and_refuses_them_after_a_write() {
    if !qemu::has_qemu() {
        return;
    }
    for durability in [BitmapDurability::ProcessDeath, BitmapDurability::CleanClose] {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(directory.path());
        let options = OpenOptions::new().access(Access::ReadWrite).bitmap_durability(durability);
        let image = Image::open(&path, &options).unwrap();
        write(&image, 1);
        freeze(&image);
        let left = killed(&path);
        assert!(!is_refused_by_qemu(&left));
        assert_eq!(qemu::dirty(&left, "daily"), parts(&[1]));
        qemu_check(&left, Tolerance::Nothing, "killed");
        // It is also what is found by the next writable open.
        let found = writable(&left);
        assert_eq!(dirty(&found, "daily"), parts(&[1]));
        found.close().unwrap();

        write(&image, 5);
        assert!(is_refused_by_qemu(&killed(&path)));
        // A second freeze of a bitmap whose bits are frozen already.
        freeze(&image);
        let left = killed(&path);
        assert!(!is_refused_by_qemu(&left));
        assert_eq!(qemu::dirty(&left, "daily"), parts(&[1, 5]));

        // When the backup is made, only what came later is left, for everyone and at once.
        write(&image, 7);
        change(&image, BitmapChange::DropFrozen { name: "daily".into() });
        let left = killed(&path);
        assert_eq!(qemu::dirty(&left, "daily"), parts(&[7]));
        assert_eq!(dirty(&image, "daily"), parts(&[7]));
        image.close().unwrap();
        assert_eq!(qemu::dirty(&path, "daily"), parts(&[7]));
    }
}

#[test]
fn dropping_frozen_bits_without_a_write_since_leaves_none_of_them() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let image = writable(&path);
    write(&image, 1);
    freeze(&image);
    change(&image, BitmapChange::DropFrozen { name: "daily".into() });
    image.close().unwrap();
    assert_eq!(qemu::dirty(&path, "daily"), []);
    assert_eq!(dirty(&writable(&path), "daily"), []);
    qemu::check(&path);
}

#[test]
fn a_clean_close_between_freeze_and_thaw_leaves_all_bits_for_everyone() {
    if !qemu::has_qemu() {
        return;
    }
    for written in [&[1][..], &[1, 5]] {
        let directory = tempfile::tempdir().unwrap();
        let path = disk(directory.path());
        let image = writable(&path);
        write(&image, 1);
        freeze(&image);
        written[1..].iter().for_each(|part| write(&image, *part));
        image.close().unwrap();
        assert!(!is_refused_by_qemu(&path));
        assert_eq!(qemu::dirty(&path, "daily"), parts(written));
        // QEMU adds its own changes.
        run("qemu-io", &["-c", "write -P 9 576k 512", text(&path)]);
        let all = parts(&[written, &[9]].concat());
        assert_eq!(qemu::dirty(&path, "daily"), all);
        let image = writable(&path);
        assert_eq!(dirty(&image, "daily"), all);
        image.close().unwrap();
        qemu::check(&path);
    }
}

#[test]
fn a_resize_while_bits_are_frozen_leaves_all_of_them_for_qemu() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let mut image = writable(&path);
    write(&image, 1);
    freeze(&image);
    write(&image, 5);
    image.resize(2 * SIZE, Shrink::Refuse).unwrap();
    let left = killed(&path);
    assert_eq!(qemu::dirty(&left, "daily"), parts(&[1, 5]));
    qemu_check(&left, Tolerance::Leaks, "killed");
    image.close().unwrap();
    let image = writable(&path);
    assert_eq!(dirty(&image, "daily"), parts(&[1, 5]));
    image.close().unwrap();
}

#[test]
fn whatever_instant_a_crash_comes_at_a_bitmap_that_qemu_takes_for_complete_is() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash in a checkpoint, seen by qemu");
    let directory = tempfile::tempdir().unwrap();
    let made = Subject::new("", Start::Used).make(directory.path(), SIZE, &mut random);
    let trial = OnTrial::new(&made);
    let image = trial.open().unwrap();
    image.add_bitmap("daily", PART, Recording::Enabled).unwrap();
    write(&image, 1);
    let frozen = trial.recorder.position();
    freeze(&image);
    write(&image, 5);
    let thawed = trial.recorder.position();
    change(&image, BitmapChange::Thaw { name: "daily".into() });
    let end = trial.recorder.position();
    let mut looked_at = 0;
    for position in frozen..=end {
        let loss = Loss::ALL[random.below(4) as usize];
        trial.crash(&made, position, loss, &mut random);
        if is_refused_by_qemu(&made.path) {
            continue;
        }
        looked_at += 1;
        let found = qemu::dirty(&made.path, "daily");
        let has = |part: u64| {
            found.iter().any(|(start, length)| (*start..start + length).contains(&(part * PART)))
        };
        let what =
            format!("{loss:?} lost after {position} of {frozen}, {thawed}, {end}: {found:?}");
        assert!(has(1), "{what}");
        assert!(has(5) || position < thawed, "{what}");
    }
    assert!(looked_at > 0, "after a change of the list it is sound");
}

#[test]
fn bits_that_are_stored_beside_unreliable_frozen_ones_are_all_dirty() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let image = writable(&path);
    freeze(&image);
    let path = killed(&path);
    let frozen = frozen_bitmap_name("daily");
    let mut bytes = std::fs::read(&path).unwrap();
    let found = bytes.windows(frozen.len()).rposition(|window| window == frozen.as_bytes());
    let entry = found.unwrap() - 24;
    bytes[entry + 15] |= 1; // in use
    std::fs::write(&path, bytes).unwrap();
    let image = writable(&path);
    write(&image, 5);
    image.close().unwrap();
    assert_eq!(qemu::dirty(&path, "daily"), [(0, SIZE)]);
    let image = writable(&path);
    let state = image.bitmaps().into_iter().find(|it| it.name == "daily").unwrap().state;
    assert!(matches!(state, BitmapState::Incomplete { problem: Some(_), .. }), "{state:?}");
    change(&image, BitmapChange::Repair { name: frozen });
    assert_eq!(image.thaw_bitmaps().unwrap(), ["daily"]);
    assert_eq!(dirty(&image, "daily"), [(0, SIZE)]);
    image.close().unwrap();
    assert_eq!(qemu::dirty(&path, "daily"), [(0, SIZE)]);
}
