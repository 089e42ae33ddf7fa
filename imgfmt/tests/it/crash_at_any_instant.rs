//! Whatever instant a crash comes at: the image opens, has at worst leaks, and holds what was
//! flushed; its snapshots are untouched, and it can be used on.
//!
//! `IMGFMT_CRASH_ROUNDS` sets how many crashes each kind of image goes through.

use std::path::Path;

use imgfmt::testing::Loss;
use imgfmt::{CacheMode, Image};

use crate::common::{self, Random, qemu};
use crate::judge::subjects::{
    Made, OnTrial, Start, Subject, Tolerance, check_snapshots, options, qemu_check, rounds,
};
use crate::judge::{self, Model};

const SIZE: u64 = (2 << 20) + 512;
const OPERATIONS: u64 = 100;

/// Runs a workload and crashes it at random places, the end and the closing included.
fn crash(subject: Subject, cache: CacheMode, random: &mut Random) {
    let directory = tempfile::tempdir().unwrap();
    let made = subject.make(directory.path(), SIZE, random);
    let trial = OnTrial::new(&made);
    let image = trial.open_cached(cache).unwrap();
    let mut model = Model::new(made.content.clone());
    // Where in the recording each operation began.
    let mut begins = vec![0, trial.recorder.position()];
    for _ in 0..OPERATIONS {
        model.step(&image, random, subject.options).unwrap();
        begins.push(trial.recorder.position());
    }
    image.close().unwrap();
    let end = trial.recorder.position();
    begins.push(end);
    for round in 0..rounds("IMGFMT_CRASH_ROUNDS", 12) {
        // Some crashes hit the last steps of an operation, where the order matters most.
        let position = match round % 3 {
            0 => begins[random.below(begins.len() as u64) as usize],
            _ => random.below(end as u64 + 1) as usize,
        };
        let operation = begins.iter().rposition(|begin| *begin <= position).unwrap_or(0) as u32;
        let loss = Loss::ALL[random.below(4) as usize];
        let what = format!(
            "{subject:?}, {cache}: {loss:?} lost after {position} of {end} changes, in operation {operation}"
        );
        trial.crash(&made, position, loss, random);
        judge_crash(&made, &model, operation, random, &what);
    }
}

fn judge_crash(made: &Made, model: &Model, operation: u32, random: &mut Random, what: &str) {
    let bytes = std::fs::read(&made.path).unwrap();
    qemu_check(&made.path, Tolerance::Leaks, what);
    check_snapshots(made, what);
    let image = Image::open(&made.path, &options()).unwrap();
    model.check_after_crash(&image, operation, what);
    use_on(&image, random, what);
    image.close().unwrap();
    qemu_check(&made.path, Tolerance::Leaks, &format!("{what}, then used on"));
    check_snapshots(made, what);
    drop(bytes);
}

/// A program that opens a crashed image must be able to work with it.
fn use_on(image: &Image, random: &mut Random, what: &str) {
    let mut content = vec![0; image.size() as usize];
    image.read_at(common::at(0), &mut content).unwrap();
    let mut model = Model::new(content);
    for _ in 0..15 {
        model.step(image, random, what).unwrap();
    }
    model.check(image, what);
}

fn crash_all(name: &str, subjects: &[Subject]) {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new(name);
    for subject in subjects {
        crash(*subject, CacheMode::Writeback, &mut random);
    }
}

/// A flush is never needed: what has returned is durable.
#[test]
fn images_survive_whose_every_write_is_durable() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash writethrough");
    for (subject, cache) in [
        (Subject::new("cluster_size=4096", Start::Used), CacheMode::Writethrough),
        (Subject::new("extended_l2=on,cluster_size=16384", Start::Used), CacheMode::DirectSync),
        (Subject::new("cluster_size=4096", Start::Snapshots), CacheMode::Writethrough),
        (Subject::new("cluster_size=4096", Start::Compressed), CacheMode::DirectSync),
        (Subject::new("cluster_size=8192", Start::RawOverlay), CacheMode::Writethrough),
        (Subject::new("data_file=DIR/data.raw", Start::Used), CacheMode::Writethrough),
    ] {
        crash(subject, cache, &mut random);
    }
}

#[test]
fn images_that_stand_alone_survive() {
    crash_all(
        "crash alone",
        &[
            Subject::new("", Start::Empty),
            Subject::new("cluster_size=512,refcount_bits=64", Start::Empty),
            Subject::new("cluster_size=4096,refcount_bits=1", Start::Used),
            Subject::new("cluster_size=2048,compat=0.10", Start::Used),
            Subject::new("cluster_size=1024,preallocation=metadata", Start::Empty),
        ],
    );
}

#[test]
fn subclusters_survive() {
    crash_all(
        "crash subclusters",
        &[
            Subject::new("extended_l2=on,cluster_size=16384", Start::Used),
            Subject::new("extended_l2=on,cluster_size=16384", Start::Snapshots),
            Subject::new("extended_l2=on", Start::Overlay),
        ],
    );
}

#[test]
fn snapshots_survive_with_the_present_state() {
    crash_all(
        "crash snapshots",
        &[
            Subject::new("cluster_size=4096", Start::Snapshots),
            Subject::new("cluster_size=512", Start::Snapshots),
            Subject::new("compat=0.10", Start::Snapshots),
        ],
    );
}

#[test]
fn overlays_and_compressed_images_survive() {
    crash_all(
        "crash overlays",
        &[
            Subject::new("cluster_size=4096", Start::Overlay),
            Subject::new("cluster_size=8192", Start::RawOverlay),
            Subject::new("compat=0.10,cluster_size=4096", Start::RawOverlay),
            Subject::new("cluster_size=4096", Start::Compressed),
            Subject::new("compression_type=zstd", Start::Compressed),
        ],
    );
}

#[test]
fn images_with_a_data_file_survive() {
    crash_all(
        "crash data file",
        &[
            Subject::new("data_file=DIR/data.raw,cluster_size=4096", Start::Used),
            Subject::new("data_file=DIR/data.raw,data_file_raw=on", Start::Used),
        ],
    );
}

#[test]
fn a_recording_that_loses_flushed_data_would_be_noticed() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("crash control");
    let made = Subject::new("", Start::Empty).make(directory.path(), SIZE, &mut random);
    let content = made.content.clone();
    let mut model = Model::new(content.clone());
    let image = open(&made.path);
    for operation in [judge::Operation::Write(imgfmt::Durability::Cached), judge::Operation::Flush]
    {
        model.run(&image, operation, 0, 4096, "control").unwrap();
    }
    model.check_bytes_after_crash(&content, 2, "in the flush the write may be lost");
    let noticed = std::panic::catch_unwind(|| {
        model.check_bytes_after_crash(&content, 3, "after the flush it may not");
    });
    assert!(noticed.is_err());
}

fn open(path: &Path) -> Image {
    Image::open(path, &options()).unwrap()
}
