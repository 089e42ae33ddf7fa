//! Whatever instant a crash comes at: the bitmaps that count as sound cover everything that differs
//! from what the disk was when they were last cleared, and none of the others is lost.
//!
//! `IMGFMT_CRASH_ROUNDS` and `IMGFMT_ERROR_ROUNDS` set how many places are tried.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A test may fail, and says what it skips.

mod common;
mod judge;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::bitmaps::dirty;
use common::{Random, at, qemu, range};
use imgfmt::storage::fault::{Fault, Loss};
use imgfmt::{BitmapChange, BitmapState, Durability, Image, Recording, Speed, ZeroMode};
use judge::subjects::{OnTrial, Start, Subject, Tolerance, options, qemu_check, rounds};

const SIZE: u64 = 1 << 20;
const EIO: i32 = 5;
const NAMES: [&str; 3] = ["a", "b", "the third"];

/// What a bitmap promises.
#[derive(Clone, Debug)]
struct Promise {
    recording: Recording,
    /// The disk when the bitmap was last cleared.
    base: Arc<Vec<u8>>,
    /// The dirty parts when it was disabled: nothing may be added.
    frozen: Option<Vec<(u64, u64)>>,
}

type Promises = BTreeMap<String, Promise>;

fn read(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(at(0), &mut bytes).unwrap();
    bytes
}

/// One random change of the list of bitmaps that is possible.
fn random_change(promises: &Promises, random: &mut Random) -> BitmapChange {
    let name = NAMES[random.below(3) as usize].to_owned();
    let Some(promise) = promises.get(&name) else {
        let granularity = 512 << random.below(8);
        return BitmapChange::Add { name, granularity, recording: Recording::Enabled };
    };
    match (random.below(3), promise.recording) {
        (0, _) => BitmapChange::Remove { name },
        (1, Recording::Enabled) => BitmapChange::Disable { name },
        _ => BitmapChange::Clear { name },
    }
}

/// What is promised behind a change that has succeeded.
fn promised(image: &Image, promises: &Promises, change: &BitmapChange) -> Promises {
    let mut promises = promises.clone();
    let base = Arc::new(read(image));
    match change {
        BitmapChange::Add { name, recording, .. } => {
            let promise = Promise { recording: *recording, base, frozen: None };
            promises.insert(name.clone(), promise);
        }
        BitmapChange::Remove { name } => {
            promises.remove(name);
        }
        BitmapChange::Clear { name } => {
            let promise = promises.get_mut(name).unwrap();
            promise.base = base;
            promise.frozen = promise.frozen.as_ref().map(|_| Vec::new());
        }
        BitmapChange::Disable { name } => {
            let promise = promises.get_mut(name).unwrap();
            promise.recording = Recording::Disabled;
            promise.frozen = Some(dirty(image, name));
        }
        other => panic!("{other:?} is not made here"),
    }
    promises
}

fn write(image: &Image, random: &mut Random) -> imgfmt::Result<()> {
    let offset = random.below(SIZE / 512) * 512;
    let length = ((random.below(40) + 1) * 512).min(SIZE - offset);
    let durability = [Durability::Cached, Durability::Fua][random.below(2) as usize];
    match random.below(4) {
        0 => image.write_zeroes(range(offset, length), ZeroMode::MayUnmap, Speed::Any, durability),
        1 => image.discard(range(offset, length), durability),
        _ => image.write_at(at(offset), &random.bytes(length as usize), durability),
    }
}

/// Whether a bitmap keeps its promise.
fn is_kept(image: &Image, name: &str, content: &[u8], promise: &Promise) -> bool {
    let dirty = dirty(image, name);
    if let Some(frozen) = &promise.frozen {
        return dirty == *frozen;
    }
    let sectors = content.chunks(512).zip(promise.base.chunks(512)).enumerate();
    let mut changed = sectors.filter(|(_, (now, then))| now != then).map(|(i, _)| i as u64 * 512);
    changed.all(|at| dirty.iter().any(|(start, length)| (*start..start + length).contains(&at)))
}

/// Fails unless each bitmap keeps one of the promises, or says that it cannot.
fn check(image: &Image, candidates: &[&Promises], what: &str) {
    let content = read(image);
    assert_eq!(image.bitmap_damage(), None, "{what}");
    let found = image.bitmaps();
    for name in NAMES {
        let promises: Vec<_> = candidates.iter().map(|list| list.get(name)).collect();
        let Some(bitmap) = found.iter().find(|bitmap| bitmap.name == name) else {
            assert!(promises.iter().any(Option::is_none), "{what}: '{name}' is lost");
            continue;
        };
        let kept = |promise: &Promise| is_kept(image, name, &content, promise);
        match &bitmap.state {
            BitmapState::Consistent { .. } => {
                let is_kept = promises.iter().flatten().any(|promise| kept(promise));
                assert!(is_kept, "{what}: '{name}' does not cover what has changed");
            }
            BitmapState::Inconsistent { .. } => {
                let may_be = |promise: &&Promise| promise.recording == Recording::Enabled;
                assert!(promises.iter().flatten().any(may_be), "{what}: '{name}' is inconsistent");
            }
            state => panic!("{what}: '{name}': {state:?}"),
        }
    }
}

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
        let folder = tempfile::tempdir().unwrap();
        let made = subject.make(folder.path(), SIZE, &mut random);
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
            history.push((trial.recording.position(), after));
        }
        let last = history.last().unwrap().1.clone();
        image.close().unwrap();
        let end = trial.recording.position();
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
            check(&image, &[&history[before].1, &history[next].1], &what);
            image.close().unwrap();
            qemu_check(&made.path, Tolerance::Leaks, &format!("{what}, closed again"));
        }
    }
}

#[test]
fn an_error_costs_no_bit() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("errors of bitmaps");
    for subject in subjects() {
        let folder = tempfile::tempdir().unwrap();
        let made = subject.make(folder.path(), SIZE, &mut random);
        let trial = OnTrial::new(&made);
        let image = trial.open().unwrap();
        let mut promises = Promises::new();
        for round in 0..rounds("IMGFMT_ERROR_ROUNDS", 60) {
            let call = trial.file.calls() + random.below(20);
            let length = [1, 3, u64::MAX / 2][random.below(3) as usize];
            let fault = Fault { calls: call..call + length, code: EIO };
            let change = random_change(&promises, &mut random);
            trial.file.set_fault((round % 2 == 0).then(|| fault.clone()));
            let _ = write(&image, &mut random);
            let result = image.bitmap_transaction(std::slice::from_ref(&change));
            trial.file.set_fault(None);
            if result.is_ok() {
                promises = promised(&image, &promises, &change);
            }
            let what = format!("{subject:?}, round {round}: {fault:?}, {change:?}: {result:?}");
            check(&image, &[&promises], &what);
            if random.below(4) == 0 {
                write(&image, &mut random).unwrap();
                check(&image, &[&promises], &what);
            }
        }
        image.close().unwrap();
        trial.put_down(&made);
        qemu_check(&made.path, Tolerance::Leaks, &format!("{subject:?}, closed"));
        let image = Image::open(&made.path, &options()).unwrap();
        check(&image, &[&promises], &format!("{subject:?}, closed and opened again"));
    }
}
