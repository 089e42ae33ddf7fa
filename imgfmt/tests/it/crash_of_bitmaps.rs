//! Whatever instant a crash comes at: the bitmaps that count as sound cover everything that differs
//! from what the disk was when they were last cleared, and none of the others is lost.
//!
//! `IMGFMT_CRASH_ROUNDS` and `IMGFMT_ERROR_ROUNDS` set how many places are tried.

use imgfmt::testing::{Fault, Loss};
use imgfmt::{BitmapChange, BitmapState, Image, Shrink};

use crate::common::{Random, qemu};
use crate::judge::promises::{
    Knowledge, Promises, check, promised, promised_after_resize, promised_when_reopened,
    random_change, write,
};
use crate::judge::subjects::{OnTrial, Start, Subject, Tolerance, options, qemu_check, rounds};

const SIZE: u64 = 1 << 20;
const EIO: i32 = 5;

fn subjects() -> [Subject; 4] {
    [
        Subject::new("", Start::Used),
        Subject::new("cluster_size=512", Start::Used),
        Subject::new("cluster_size=4096", Start::Overlay),
        Subject::new("cluster_size=16384,extended_l2=on", Start::Snapshots),
    ]
}

#[test]
fn what_is_sound_after_a_crash_covers_what_has_changed() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash of bitmaps");
    for subject in subjects() {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let trial = OnTrial::new(&made);
        let image = trial.open().unwrap();
        let mut history = vec![(0, Promises::new())];
        for _ in 0..60 {
            let (_, promises) = history.last().unwrap().clone();
            let after = match random.below(3) {
                0 => {
                    let change = random_change(&promises, &mut random);
                    image.bitmap_transaction(std::slice::from_ref(&change)).unwrap();
                    promised(&image, &promises, &change)
                }
                _ => {
                    write(&image, &mut random).unwrap();
                    promises
                }
            };
            history.push((trial.recorder.position(), after));
        }
        let last = history.last().unwrap().1.clone();
        image.close().unwrap();
        let end = trial.recorder.position();
        history.push((end, last));
        for _ in 0..rounds("IMGFMT_CRASH_ROUNDS", 25) {
            let position = random.below(end as u64 + 1) as usize;
            let loss = Loss::ALL[random.below(4) as usize];
            let what = format!("{subject:?}: {loss:?} lost after {position} of {end}");
            trial.crash(&made, position, loss, &mut random);
            qemu_check(&made.path, Tolerance::Leaks, &what);
            // The change that it came in is done or not; all before it is.
            let next = history.iter().position(|(done, _)| *done >= position).unwrap();
            let before = next.saturating_sub(1);
            let image = Image::open(&made.path, &options()).unwrap();
            check(&image, &[&history[before].1, &history[next].1], Knowledge::MayBeLost, &what);
            image.close().unwrap();
            qemu_check(&made.path, Tolerance::Leaks, &format!("{what}, closed again"));
        }
    }
}

/// A size near the one that the disk has.
fn random_size(image: &Image, random: &mut Random) -> u64 {
    match random.below(2) {
        0 => image.size() + (random.below(300) + 1) * 512,
        _ => (image.size() / 512).saturating_sub(random.below(300)).max(100) * 512,
    }
}

/// What is promised behind a change of size that may have failed. Bitmaps that could not be loaded
/// are lost, and can be removed.
fn promised_after_resize_or_lost(image: &Image, promises: &Promises) -> Promises {
    let mut promises = promises.clone();
    for bitmap in image.bitmaps() {
        if !matches!(bitmap.state, BitmapState::Consistent { .. }) {
            image
                .bitmap_transaction(&[BitmapChange::Remove { name: bitmap.name.clone() }])
                .unwrap();
            promises.remove(&bitmap.name);
        }
    }
    promised_after_resize(image, &promises)
}

#[test]
fn an_error_costs_no_bit() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("errors of bitmaps");
    for subject in subjects() {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let trial = OnTrial::new(&made);
        let mut image = trial.open().unwrap();
        let mut promises = Promises::new();
        for round in 0..rounds("IMGFMT_ERROR_ROUNDS", 60) {
            let call = trial.file.calls() + random.below(20);
            let length = [1, 3, u64::MAX / 2][random.below(3) as usize];
            let fault = Fault { calls: call..call + length, code: EIO };
            trial.file.set_fault((round % 2 == 0).then(|| fault.clone()));
            let what = if random.below(4) == 0 {
                let size = random_size(&image, &mut random);
                let result = image.resize(size, Shrink::Allow);
                trial.file.set_fault(None);
                promises = promised_after_resize_or_lost(&image, &promises);
                format!("resize to {size}: {result:?}")
            } else {
                let change = random_change(&promises, &mut random);
                let _ = write(&image, &mut random);
                let result = image.bitmap_transaction(std::slice::from_ref(&change));
                trial.file.set_fault(None);
                if result.is_ok() {
                    promises = promised(&image, &promises, &change);
                }
                format!("{change:?}: {result:?}")
            };
            let what = format!("{subject:?}, round {round}: {fault:?}, {what}");
            check(&image, &[&promises], Knowledge::Kept, &what);
            // The first may report a sync that failed in another operation.
            let _ = image.flush();
            if random.below(4) == 0 {
                write(&image, &mut random).unwrap();
                check(&image, &[&promises], Knowledge::Kept, &what);
            }
        }
        image.close().unwrap();
        trial.put_down(&made);
        qemu_check(&made.path, Tolerance::Leaks, &format!("{subject:?}, closed"));
        let image = Image::open(&made.path, &options()).unwrap();
        let what = format!("{subject:?}, closed and opened again");
        let promises = promised_when_reopened(&image, &promises);
        check(&image, &[&promises], Knowledge::Kept, &what);
    }
}
