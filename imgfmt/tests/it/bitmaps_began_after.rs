//! A disk says after which backup each of its bitmaps began, and a crash at any instant makes it
//! say nothing wrong.

use imgfmt::testing::{Fault, Loss};
use imgfmt::{
    BeganAfter, BitmapChange, BitmapState, CreateOptions, Format, Image, Recording, Shrink, Uuid,
};

use crate::backup_identity::{PART, SIZE, disk, writable, write};
use crate::common::bitmaps::dirty;
use crate::common::{Random, qemu, run, text};
use crate::judge::subjects::{OnTrial, Start, Subject, Tolerance, options, qemu_check, rounds};

fn change(image: &Image, change: BitmapChange) {
    image.bitmap_transaction(&[change]).unwrap();
}

fn began_after(image: &Image, name: &str) -> BeganAfter {
    image.bitmaps().into_iter().find(|bitmap| bitmap.name == name).unwrap().began_after
}

fn daily() -> String {
    "daily".into()
}

/// A backup of the disk is made, completely.
fn back_up(image: &Image) -> Uuid {
    let id = Uuid::random().unwrap();
    change(image, BitmapChange::Freeze { name: daily(), backup: Some(id) });
    change(image, BitmapChange::DropFrozen { name: daily() });
    id
}

#[test]
fn a_bitmap_began_after_the_backup_that_was_completed_last() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let image = writable(&path);
    image.add_bitmap("daily", PART, Recording::Enabled).unwrap();
    assert_eq!(began_after(&image, "daily"), BeganAfter::Unknown);
    assert_eq!(image.disk_id(), None);
    let first = back_up(&image);
    assert_eq!(began_after(&image, "daily"), BeganAfter::Backup(first));
    let disk_id = image.disk_id();
    assert!(disk_id.is_some());

    // One that fails, or is cut off, changes nothing.
    for _ in 0..2 {
        let id = Uuid::random().unwrap();
        change(&image, BitmapChange::Freeze { name: daily(), backup: Some(id) });
        assert_eq!(began_after(&image, "daily"), BeganAfter::Backup(first));
        write(&image, 3);
        change(&image, BitmapChange::Thaw { name: daily() });
        assert_eq!(began_after(&image, "daily"), BeganAfter::Backup(first));
    }
    let id = Uuid::random().unwrap();
    change(&image, BitmapChange::Freeze { name: daily(), backup: Some(id) });
    image.close().unwrap();
    let image = writable(&path);
    assert_eq!(began_after(&image, "daily"), BeganAfter::Backup(first));
    let second = back_up(&image);
    image.add_bitmap("weekly", PART, Recording::Enabled).unwrap();
    image.close().unwrap();
    let image = writable(&path);
    assert_eq!(began_after(&image, "daily"), BeganAfter::Backup(second));
    assert_eq!(began_after(&image, "weekly"), BeganAfter::Unknown);
    assert_eq!(image.disk_id(), disk_id);
    image.close().unwrap();
}

#[test]
fn what_makes_a_bitmap_begin_anew_or_miss_changes_makes_its_backup_unknown() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let image = writable(&path);
    image.add_bitmap("daily", PART, Recording::Enabled).unwrap();
    let granularity = PART;
    let losses: [fn(String) -> BitmapChange; 2] =
        [|name| BitmapChange::Clear { name }, |name| BitmapChange::Disable { name }];
    for loss in losses {
        back_up(&image);
        change(&image, loss(daily()));
        change(&image, BitmapChange::Enable { name: daily() });
        assert_eq!(began_after(&image, "daily"), BeganAfter::Unknown, "{:?}", loss(daily()));
    }
    back_up(&image);
    let recording = Recording::Enabled;
    let anew = [
        BitmapChange::Remove { name: daily() },
        BitmapChange::Add { name: daily(), granularity, recording },
    ];
    image.bitmap_transaction(&anew).unwrap();
    assert_eq!(began_after(&image, "daily"), BeganAfter::Unknown);

    // What only makes more dirty does not.
    let id = back_up(&image);
    change(&image, BitmapChange::MarkAll { name: daily() });
    assert_eq!(began_after(&image, "daily"), BeganAfter::Backup(id));
    // What is cut off and added again is not what it was, and clean.
    image.close().unwrap();
    for size in [SIZE / 2, SIZE] {
        let mut image = writable(&path);
        image.resize(size, Shrink::Allow).unwrap();
        image.close().unwrap();
    }
    let image = writable(&path);
    assert_eq!(began_after(&image, "daily"), BeganAfter::Unknown);
    image.close().unwrap();
}

#[test]
fn a_bitmap_that_another_program_may_have_cleared_is_told_apart() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    let image = writable(&path);
    image.add_bitmap("daily", PART, Recording::Enabled).unwrap();
    let id = back_up(&image);
    image.close().unwrap();
    run("qemu-img", &["info", text(&path)]);
    run("qemu-img", &["check", "-q", text(&path)]);
    assert_eq!(began_after(&writable(&path), "daily"), BeganAfter::Backup(id));
    run("qemu-img", &["bitmap", "--clear", text(&path), "daily"]);
    for _ in 0..2 {
        let image = writable(&path);
        assert_eq!(began_after(&image, "daily"), BeganAfter::PerhapsBackup(id));
        image.close().unwrap();
    }
    // The next backup is known again.
    let image = writable(&path);
    let id = back_up(&image);
    image.close().unwrap();
    assert_eq!(began_after(&writable(&path), "daily"), BeganAfter::Backup(id));
    qemu::check(&path);
}

#[test]
fn images_whose_header_has_no_room_are_used_without() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut options = CreateOptions::new(Format::Qcow2, SIZE);
    options.cluster_size = 512;
    Image::create(&path, &options).unwrap();
    let image = writable(&path);
    let granularity = PART;
    for number in 0..8 {
        let name = format!("{number}{}", "x".repeat(100));
        let recording = Recording::Enabled;
        change(&image, BitmapChange::Add { name: name.clone(), granularity, recording });
        let id = Uuid::random().unwrap();
        change(&image, BitmapChange::Freeze { name: name.clone(), backup: Some(id) });
        change(&image, BitmapChange::DropFrozen { name: name.clone() });
        let found = began_after(&image, &name);
        assert!([BeganAfter::Backup(id), BeganAfter::Unknown].contains(&found), "{found:?}");
    }
    assert_eq!(began_after(&image, &format!("7{}", "x".repeat(100))), BeganAfter::Unknown);
    image.close().unwrap();
    writable(&path).close().unwrap();
}

/// What was done to a disk on trial.
#[derive(Default)]
struct History {
    /// Where each write was done, and what it wrote. Before that the bitmap is marked as in use.
    writes: Vec<(usize, u64)>,
    /// Each backup, how many writes were done before it, and where its completion began.
    backups: Vec<(Uuid, usize, Option<usize>)>,
}

#[test]
fn errors_and_a_crash_after_them_make_no_bitmap_name_a_backup_too_late() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("errors in a backup");
    let directory = tempfile::tempdir().unwrap();
    let made = Subject::new("", Start::Used).make(directory.path(), SIZE, &mut random);
    let mut looked_at = 0;
    for round in 0..rounds("IMGFMT_ERROR_ROUNDS", 120) {
        let trial = OnTrial::new(&made);
        let image = trial.open().unwrap();
        image.add_bitmap("daily", PART, Recording::Enabled).unwrap();
        let old = back_up(&image);
        write(&image, 3);
        let new = Uuid::random().unwrap();
        change(&image, BitmapChange::Freeze { name: daily(), backup: Some(new) });
        let calls = trial.file.calls() + random.below(40);
        let calls = calls..calls + [1, 2, 5, u64::MAX / 2][random.below(4) as usize];
        trial.file.set_fault(Some(Fault { calls: calls.clone(), code: 5 }));
        let dropped = image.bitmap_transaction(&[BitmapChange::DropFrozen { name: daily() }]);
        trial.file.set_fault(None);
        let what = format!("round {round}, errors in {calls:?}, {dropped:?}");
        let loss = Loss::ALL[random.below(4) as usize];
        trial.crash(&made, trial.recorder.position(), loss, &mut random);
        std::mem::forget(image);
        let image = Image::open(&made.path, &options()).unwrap();
        let found = image.bitmaps().into_iter().find(|it| it.name == "daily").unwrap();
        if !matches!(found.state, BitmapState::Consistent { .. }) {
            continue;
        }
        looked_at += 1;
        let has_old = dirty(&image, "daily") == [(3 * PART, PART)];
        match found.began_after {
            BeganAfter::Backup(id) if id == old => assert!(has_old, "{what}, {loss:?}: lost"),
            BeganAfter::Backup(id) => assert_eq!(id, new, "{what}"),
            _ => {}
        }
        image.close().unwrap();
    }
    assert!(looked_at > 0);
}

#[test]
fn whatever_instant_a_crash_comes_at_a_bitmap_has_all_changes_since_the_backup_that_it_names() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash in a backup");
    for options_of in ["", "cluster_size=4096"] {
        let directory = tempfile::tempdir().unwrap();
        let made = Subject::new(options_of, Start::Used).make(directory.path(), SIZE, &mut random);
        let trial = OnTrial::new(&made);
        let image = trial.open().unwrap();
        image.add_bitmap("daily", PART, Recording::Enabled).unwrap();
        let first = trial.recorder.position();
        let mut history = History::default();
        let mut marks = Vec::new();
        for _ in 0..12 {
            let mut some = |history: &mut History| {
                let part = random.below(SIZE / PART);
                write(&image, part);
                history.writes.push((trial.recorder.position(), part));
            };
            some(&mut history);
            let id = Uuid::random().unwrap();
            history.backups.push((id, history.writes.len(), None));
            change(&image, BitmapChange::Freeze { name: daily(), backup: Some(id) });
            marks.push(trial.recorder.position());
            some(&mut history);
            match random.below(3) {
                0 => change(&image, BitmapChange::Thaw { name: daily() }),
                _ => {
                    history.backups.last_mut().unwrap().2 = Some(trial.recorder.position());
                    change(&image, BitmapChange::DropFrozen { name: daily() });
                }
            }
            marks.push(trial.recorder.position());
        }
        let end = trial.recorder.position();
        let random_ones = 0..rounds("IMGFMT_CRASH_ROUNDS", 60);
        let between = |random: &mut Random| first + random.below((end - first) as u64) as usize;
        marks.extend(random_ones.map(|_| between(&mut random)));
        let mut looked_at = 0;
        for position in marks {
            let loss = Loss::ALL[random.below(4) as usize];
            trial.crash(&made, position, loss, &mut random);
            let what = format!("{loss:?} lost after {position} of {end}");
            qemu_check(&made.path, Tolerance::Leaks, &what);
            let image = Image::open(&made.path, &options()).unwrap();
            let found = image.bitmaps().into_iter().find(|it| it.name == "daily").unwrap();
            let BeganAfter::Backup(id) = found.began_after else { continue };
            let is_it = |(other, ..): &&(Uuid, usize, Option<usize>)| *other == id;
            let (_, before, completed) = *history.backups.iter().find(is_it).unwrap();
            assert!(completed.is_some_and(|at| at <= position), "{what}: it was not completed");
            if !matches!(found.state, BitmapState::Consistent { .. }) {
                continue;
            }
            looked_at += 1;
            let found = dirty(&image, "daily");
            for (at, part) in &history.writes[before..] {
                let place = part * PART;
                let is_dirty =
                    found.iter().any(|(start, length)| (*start..start + length).contains(&place));
                assert!(*at > position || is_dirty, "{what}: part {part} is not in {found:?}");
            }
            image.close().unwrap();
        }
        assert!(looked_at > 0, "after a change of the list it is sound");
    }
}
