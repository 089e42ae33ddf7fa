//! An image and its sidecar crash together, after any change of any of their files: bitmaps are
//! recovered, and cover everything that differs from the disk when they were last cleared.
//!
//! `IMGFMT_CRASH_ROUNDS` sets how many crashes each workload goes through.

use std::path::Path;

use imgfmt::testing::Loss;
use imgfmt::{Access, BitmapDurability, Image, RecoveryPrecision, Shrink};

use crate::common::{Random, qemu};
use crate::judge::joint::{BOOT, Files, Joint, SECOND_BOOT, THIRD_BOOT};
use crate::judge::promises::{self, Knowledge, Promises, check, promised, random_change, write};
use crate::judge::subjects::{Made, Start, Subject, Tolerance, options, qemu_check, rounds};

const SIZE: u64 = 1 << 20;
const OPERATIONS: u32 = 70;

/// What is true when so many changes have been recorded.
struct Step {
    done: usize,
    promises: Promises,
    /// Bitmaps that a crash meets in the middle of this are lost.
    is_resize: bool,
    what: String,
}

/// A workload that went to its end.
struct History {
    joint: Joint,
    steps: Vec<Step>,
}

/// Snapshots and the sizes of the disk that they were made of.
type Snapshots = Vec<(String, u64)>;

fn one_step(
    image: &mut Image,
    snapshots: &mut Snapshots,
    promises: &Promises,
    random: &mut Random,
) -> (Promises, String) {
    let size = image.size();
    match random.below(20) {
        0..=4 => {
            let change = random_change(promises, random);
            image.bitmap_transaction(std::slice::from_ref(&change)).unwrap();
            (promised(image, promises, &change), format!("{change:?}"))
        }
        5 => {
            let size = match random.below(2) {
                0 => size + (random.below(300) + 1) * 512,
                _ => (size / 512).saturating_sub(random.below(300)).max(100) * 512,
            };
            image.resize(size, Shrink::Allow).unwrap();
            (promises::promised_after_resize(image, promises), "resize".into())
        }
        6 => {
            let one = random.below(snapshots.len().max(1) as u64) as usize;
            match (snapshots.get(one).cloned(), random.below(3)) {
                (Some((name, _)), 0) => {
                    image.delete_snapshot(&name).unwrap();
                    snapshots.retain(|(other, _)| *other != name);
                    (promises.clone(), "delete".into())
                }
                (Some((name, of)), 1) => {
                    image.apply_snapshot(&name).unwrap();
                    match of == size {
                        true => (promises.clone(), "apply".into()),
                        false => {
                            (promises::promised_after_resize(image, promises), "resize".into())
                        }
                    }
                }
                _ => {
                    let name = format!("made {}", random.next());
                    image.create_snapshot(&name).unwrap();
                    snapshots.push((name, size));
                    (promises.clone(), "create".into())
                }
            }
        }
        7 => {
            image.flush().unwrap();
            (promises.clone(), "flush".into())
        }
        _ => {
            write(image, random).unwrap();
            (promises.clone(), "write".into())
        }
    }
}

fn run(made: &Made, durability: BitmapDurability, random: &mut Random) -> History {
    let files = Files { image: made.bytes.clone(), sidecar: None };
    let joint = Joint::new(&files, durability, BOOT);
    let mut image = joint.open().unwrap();
    let mut snapshots = made.snapshots.iter().map(|(name, _)| (name.clone(), SIZE)).collect();
    let mut promises = Promises::new();
    let mut steps = Vec::new();
    for _ in 0..OPERATIONS {
        let what;
        if random.below(25) == 0 {
            image.close().unwrap();
            image = joint.open().unwrap();
            promises = promises::promised_when_reopened(&image, &promises);
            what = "close and open".to_owned();
        } else {
            (promises, what) = one_step(&mut image, &mut snapshots, &promises, random);
        }
        steps.push(Step {
            done: joint.recorder.position(),
            promises: promises.clone(),
            is_resize: what == "resize",
            what,
        });
    }
    image.close().unwrap();
    let done = joint.recorder.position();
    steps.push(Step { done, promises, is_resize: false, what: "close".into() });
    History { joint, steps }
}

/// The next boot after a crash: the same one if only the process died.
fn boot_after(boot: &'static str, loss: Loss, next: &'static str) -> &'static str {
    if loss == Loss::Nothing { boot } else { next }
}

/// What is left after a crash, and in which boot; now and then that is recovered and the recovery
/// crashes too.
fn crash(
    history: &History,
    durability: BitmapDurability,
    position: usize,
    losses: [Option<Loss>; 2],
    random: &mut Random,
) -> (Files, &'static str) {
    let first = losses[0].unwrap_or(Loss::Nothing);
    let files = history.joint.crash(position, first, random);
    let boot = boot_after(BOOT, first, SECOND_BOOT);
    let Some(second) = losses[1] else { return (files, boot) };
    let recovery = Joint::new(&files, durability, boot);
    // Dropped: an image is closed then.
    drop(recovery.open().unwrap());
    let position = random.below(recovery.recorder.position() as u64 + 1) as usize;
    (recovery.crash(position, second, random), boot_after(boot, second, THIRD_BOOT))
}

/// Crashes at random places; `losses` are tried at the level of `durability`.
fn crash_often(
    durability: BitmapDurability,
    losses: &[Loss],
    subject: Subject,
    random: &mut Random,
) -> [u32; 2] {
    let directory = tempfile::tempdir().unwrap();
    let made = subject.make(directory.path(), SIZE, random);
    let history = run(&made, durability, random);
    let end = history.steps.last().unwrap().done as u64;
    let mut recovered = [0, 0];
    for round in 0..rounds("IMGFMT_CRASH_ROUNDS", 16) {
        let position = random.below(end + 1) as usize;
        let pick = |random: &mut Random| losses[random.below(losses.len() as u64) as usize];
        let (first, second) = (pick(random), pick(random));
        let second = (random.below(3) == 0).then_some(second);
        // Some crashes lose nothing: what is recovered then is exact.
        let (first, second) = if round % 4 == 0 { (Loss::Nothing, None) } else { (first, second) };
        let next = history.steps.iter().position(|step| step.done >= position).unwrap();
        let (before, after) = (&history.steps[next.saturating_sub(1)], &history.steps[next]);
        let what = format!(
            "{durability:?}, {subject:?}: {first:?} lost after {position} of {end} ({} to {}, {}), \
             then {second:?}",
            before.done, after.done, after.what
        );
        let (files, boot) = crash(&history, durability, position, [Some(first), second], random);
        files.put_down(&made.path, boot);
        if round % 8 == 0 {
            qemu_check(&made.path, Tolerance::CopiedFlags, &what);
        }
        let is_kept = durability == BitmapDurability::PowerLoss
            || first == Loss::Nothing && second.is_none_or(|loss| loss == Loss::Nothing);
        let knowledge = match (after.is_resize, is_kept) {
            (true, _) => Knowledge::AllMayBeLost,
            (_, true) => Knowledge::Kept,
            (_, false) => Knowledge::MayBeLost,
        };
        let none = Promises::new();
        let before = if next == 0 { &none } else { &before.promises };
        let kind = judge_after_crash(&made.path, &[before, &after.promises], knowledge, &what);
        if let Some(kind) = kind {
            recovered[kind as usize] += 1;
        }
        if round % 8 == 1 {
            qemu_check(&made.path, Tolerance::Leaks, &format!("{what}, closed again"));
        }
    }
    println!(
        "{durability:?}, {subject:?}: recovered exactly {}, by extents {}",
        recovered[0], recovered[1]
    );
    recovered
}

/// Readers, the process that recovers, and later ones see bits that cover everything.
fn judge_after_crash(
    path: &Path,
    candidates: &[&Promises],
    knowledge: Knowledge,
    what: &str,
) -> Option<RecoveryPrecision> {
    let read_only = options().access(Access::ReadOnly);
    check(&Image::open(path, &read_only).unwrap(), candidates, knowledge, &format!("{what}, read"));
    let image = Image::open(path, &options()).unwrap();
    let status = image.bitmap_durability();
    check(&image, candidates, knowledge, what);
    image.close().unwrap();
    assert!(!path.with_extension("qcow2.dirty").exists() || status.recovered.is_empty(), "{what}");
    let image = Image::open(path, &read_only).unwrap();
    check(&image, candidates, knowledge, &format!("{what}, later"));
    (!status.recovered.is_empty()).then_some(status.precision)
}

fn subjects() -> [Subject; 4] {
    [
        Subject::new("", Start::Used),
        Subject::new("cluster_size=512", Start::Used),
        Subject::new("cluster_size=4096", Start::Overlay),
        Subject::new("cluster_size=16384,extended_l2=on", Start::Snapshots),
    ]
}

fn crash_all(what: &str, durability: BitmapDurability, losses: &[Loss]) {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new(what);
    let all = subjects().map(|subject| crash_often(durability, losses, subject, &mut random));
    let is_some = |kind: usize| all.iter().any(|recovered| recovered[kind] > 0);
    assert!(is_some(0), "nothing was ever recovered exactly");
    let by_extents = durability == BitmapDurability::PowerLoss;
    assert_eq!(is_some(1), by_extents, "only this level is recovered by extents");
}

#[test]
fn after_the_death_of_the_process_every_bitmap_is_recovered() {
    crash_all("death of the process", BitmapDurability::ProcessDeath, &[Loss::Nothing]);
}

#[test]
fn after_a_loss_of_power_every_bitmap_is_recovered() {
    crash_all("loss of power", BitmapDurability::PowerLoss, &Loss::ALL);
}

#[test]
fn what_was_kept_for_the_death_of_the_process_is_not_believed_after_a_loss_of_power() {
    crash_all("loss of power at the lower level", BitmapDurability::ProcessDeath, &Loss::ALL);
}
