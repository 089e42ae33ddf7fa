//! A crash, or an error, while a snapshot is made, applied (also of another size) or deleted or the
//! disk is resized: the image is afterwards what it was before or what it was to become, and its
//! snapshots are whole.
//!
//! `IMGFMT_CRASH_ROUNDS` sets how many crashes each change goes through.

use std::collections::BTreeMap;

use imgfmt::testing::{Fault, Loss};
use imgfmt::{Durability, Image, OpenOptions, Shrink};

use crate::common::{Random, at, qemu};
use crate::judge::Model;
use crate::judge::subjects::{
    Made, OnTrial, Start, Subject, Tolerance, options, qemu_check, rounds,
};

const SIZE: u64 = 1 << 20;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

const SUBJECTS: [Subject; 7] = [
    Subject::new("", Start::Used),
    Subject::new("cluster_size=512", Start::Empty),
    Subject::new("cluster_size=4096,compat=0.10", Start::Used),
    Subject::new("cluster_size=4096", Start::Snapshots),
    Subject::new("cluster_size=4096", Start::Overlay),
    Subject::new("cluster_size=16384,extended_l2=on", Start::Snapshots),
    Subject::new("cluster_size=4096,refcount_bits=64", Start::Compressed),
];

/// All there is to see of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    disk: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, Debug)]
enum Change {
    Create(String),
    Apply(String),
    Delete(String),
    Resize(u64),
}

impl Change {
    fn random(subject: Subject, state: &State, random: &mut Random) -> Self {
        let size = state.disk.len() as u64;
        let names: Vec<&String> = state.snapshots.keys().collect();
        let one = |random: &mut Random| names[random.below(names.len() as u64) as usize].clone();
        // Nor do snapshots of version 2 know their size.
        let is_fixed = subject.options.contains("0.10") && !names.is_empty();
        let first = if is_fixed { 2 } else { 0 };
        match first + random.below(9 - first) {
            0 => Self::Resize(size + (random.below(3000) + 1) * 512),
            1 => Self::Resize((size / 512).saturating_sub(random.below(500)).max(1) * 512),
            2..=4 => Self::Create(format!("made {}", random.next())),
            5 | 6 if !names.is_empty() => Self::Apply(one(random)),
            _ if !names.is_empty() => Self::Delete(one(random)),
            _ => Self::Create(format!("made {}", random.next())),
        }
    }

    fn run(&self, image: &mut Image) -> imgfmt::Result<()> {
        match self {
            Self::Create(name) => image.create_snapshot(name),
            Self::Apply(name) => image.apply_snapshot(name),
            Self::Delete(name) => image.delete_snapshot(name),
            Self::Resize(size) => image.resize(*size, Shrink::Allow),
        }
    }

    /// What the image is to become.
    fn of(&self, state: &State) -> State {
        let mut state = state.clone();
        match self {
            Self::Create(name) => {
                state.snapshots.insert(name.clone(), state.disk.clone());
            }
            Self::Apply(name) => state.disk = state.snapshots[name].clone(),
            Self::Delete(name) => {
                state.snapshots.remove(name);
            }
            Self::Resize(size) => state.disk.resize(*size as usize, 0),
        }
        state
    }
}

fn read_only() -> OpenOptions {
    let mut options = options();
    options.access = imgfmt::Access::ReadOnly;
    options
}

fn read(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(at(0), &mut bytes).unwrap();
    bytes
}

fn look(made: &Made) -> State {
    let image = Image::open(&made.path, &read_only()).unwrap();
    let names: Vec<String> = image
        .info()
        .unwrap()
        .qcow2
        .unwrap()
        .snapshots
        .iter()
        .map(|snapshot| snapshot.name.clone())
        .collect();
    let snapshots = names.into_iter().map(|name| {
        let image = Image::open(&made.path, &read_only().snapshot(&name)).unwrap();
        (name, read(&image))
    });
    State { disk: read(&image), snapshots: snapshots.collect() }
}

/// Where two states differ, without printing all of them.
fn difference(found: &State, expected: &State) -> String {
    let names = |state: &State| state.snapshots.keys().cloned().collect::<Vec<_>>();
    let place = found.disk.iter().zip(&expected.disk).position(|(a, b)| a != b);
    let differing: Vec<_> = found
        .snapshots
        .iter()
        .filter(|(name, content)| expected.snapshots.get(*name) != Some(*content))
        .map(|(name, _)| name)
        .collect();
    format!(
        "sizes {} and {}, first difference {place:?}, snapshots {:?} and {:?}, differing {differing:?}",
        found.disk.len(),
        expected.disk.len(),
        names(found),
        names(expected),
    )
}

fn check(made: &Made, before: &State, after: &State, what: &str) {
    qemu_check(&made.path, Tolerance::CopiedFlags, what);
    let found = look(made);
    assert!(
        found == *before || found == *after,
        "{what}: neither what it was ({}) nor what it was to be ({})",
        difference(&found, before),
        difference(&found, after)
    );
}

/// The next user of the image must not destroy its snapshots.
fn overwrite(made: &Made, what: &str) {
    let before = look(made);
    let image = Image::open(&made.path, &options()).unwrap();
    for offset in (0..image.size()).step_by(65536) {
        let length = (image.size() - offset).min(65536 - 512);
        image.write_at(at(offset), &vec![0x5a; length as usize], Durability::Cached).unwrap();
    }
    image.close().unwrap();
    let after = look(made);
    assert!(
        after.snapshots == before.snapshots,
        "{what}: writing on damaged snapshots: {}",
        difference(&after, &before)
    );
    // The program that opened it for writing has repaired it, if it has a mark that tells to.
    if image_version(made) >= 3 {
        qemu_check(&made.path, Tolerance::Leaks, &format!("{what}: opened for writing"));
    }
}

fn image_version(made: &Made) -> u8 {
    made.bytes[7]
}

/// Writes at random and flushes, so that the state before a change is durable.
fn use_on(image: &Image, state: &mut State, random: &mut Random, what: &str) {
    let mut model = Model::new(state.disk.clone());
    for _ in 0..8 {
        model.step(image, random, what).unwrap();
    }
    image.flush().unwrap();
    state.disk = model.current;
}

#[test]
fn a_crash_leaves_the_state_before_or_after() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash structure");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let mut state = look(&made);
        let trial = OnTrial::new(&made);
        let mut image = trial.open().unwrap();
        for _ in 0..7 {
            use_on(&image, &mut state, &mut random, subject.options);
            let begin = trial.recorder.position();
            let change = Change::random(subject, &state, &mut random);
            change
                .run(&mut image)
                .unwrap_or_else(|error| panic!("{subject:?}, {change:?}: {error}"));
            let end = trial.recorder.position();
            let after = change.of(&state);
            let what = format!("{subject:?}, {change:?}");
            assert!(read(&image) == after.disk, "{what}: the open image shows something else");
            for _ in 0..rounds("IMGFMT_CRASH_ROUNDS", 4) {
                let position = begin + random.below((end - begin) as u64 + 1) as usize;
                let loss = Loss::ALL[random.below(4) as usize];
                trial.crash(&made, position, loss, &mut random);
                let what =
                    format!("{what}: {loss:?} lost after {} of {}", position - begin, end - begin);
                check(&made, &state, &after, &what);
                overwrite(&made, &what);
            }
            // A change that has returned is durable.
            trial.crash(&made, end, Loss::Everything, &mut random);
            check(&made, &after, &after, &format!("{what}: all lost after it"));
            state = after;
        }
        image.close().unwrap();
        trial.put_down(&made);
        qemu_check(&made.path, Tolerance::Nothing, &format!("{subject:?}, closed"));
        check(&made, &state, &state, &format!("{subject:?}, closed"));
    }
}

#[test]
fn an_error_leaves_the_state_before_or_after_and_the_image_in_use() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("errors in structure");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let mut state = look(&made);
        let trial = OnTrial::new(&made);
        let mut image = trial.open().unwrap();
        for _ in 0..rounds("IMGFMT_ERROR_ROUNDS", 14) {
            use_on(&image, &mut state, &mut random, subject.options);
            let change = Change::random(subject, &state, &mut random);
            let call = trial.file.calls() + random.below(30);
            let length = [1, 3, u64::MAX / 2][random.below(3) as usize];
            let code = [EIO, ENOSPC][random.below(2) as usize];
            trial.file.set_fault(Some(Fault { calls: call..call + length, code }));
            let result = change.run(&mut image);
            trial.file.set_fault(None);
            let after = change.of(&state);
            let what = format!("{subject:?}, {change:?}, {code} for {length}: {result:?}");
            let shown = read(&image);
            match result {
                Ok(()) => assert!(shown == after.disk, "{what}: shows something else"),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(code), "{what}");
                    assert!(
                        shown == state.disk || shown == after.disk,
                        "{what}: shows neither the old nor the new disk"
                    );
                }
            }
            // A flush that works again must leave one of the two states, and the open image must
            // be in the same one.
            while image.flush().is_err() {}
            trial.put_down(&made);
            check(&made, &state, &after, &what);
            state = look(&made);
            assert!(read(&image) == state.disk, "{what}: the file holds something else");
        }
        image.close().unwrap();
        trial.put_down(&made);
        let what = format!("{subject:?}, closed");
        check(&made, &state, &state, &what);
    }
}
