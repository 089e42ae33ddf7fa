//! A call of the storage that fails makes one operation fail and nothing else: the image stays
//! consistent and in use, and nothing that was flushed is lost.
//!
//! `IMGFMT_ERROR_ROUNDS` sets how many places each kind of image fails at.

use imgfmt::testing::{Fault, Loss};
use imgfmt::{Image, OpenOptions};

use crate::common::{Random, qemu};
use crate::judge::Model;
use crate::judge::subjects::{
    Made, OnTrial, Start, Subject, Tolerance, check_snapshots, options, qemu_check, rounds,
};

const SIZE: u64 = 1 << 20;
const OPERATIONS: u64 = 40;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

const SUBJECTS: [Subject; 8] = [
    Subject::new("", Start::Empty),
    Subject::new("cluster_size=512,refcount_bits=64", Start::Empty),
    Subject::new("cluster_size=4096,compat=0.10", Start::Used),
    Subject::new("cluster_size=4096", Start::Snapshots),
    Subject::new("cluster_size=4096", Start::Overlay),
    Subject::new("cluster_size=16384,extended_l2=on", Start::Snapshots),
    Subject::new("cluster_size=4096", Start::Compressed),
    Subject::new("data_file=DIR/data.raw,cluster_size=4096", Start::Used),
];

fn set_fault(trial: &OnTrial, fault: Option<Fault>) {
    trial.file.set_fault(fault.clone());
    if let Some(data) = &trial.data {
        data.set_fault(fault);
    }
}

fn failed(trial: &OnTrial) -> u64 {
    trial.file.failed() + trial.data.as_ref().map_or(0, |data| data.failed())
}

/// How many calls the workload of a seed makes when nothing fails.
fn count_calls(made: &Made, seed: u64) -> (u64, u64) {
    let trial = OnTrial::new(made);
    let image = trial.open().unwrap();
    let first = trial.file.calls();
    let mut random = Random::seeded(seed);
    let mut model = Model::new(made.content.clone());
    for _ in 0..OPERATIONS {
        model.step(&image, &mut random, "counting").unwrap();
    }
    image.close().unwrap();
    (first, trial.file.calls())
}

/// Runs the workload of a seed with a fault; returns whether it came to pass.
fn fail(made: &Made, seed: u64, fault: &Fault, random: &mut Random, what: &str) -> bool {
    let trial = OnTrial::new(made);
    let image = trial.open().unwrap();
    let mut model = Model::new(made.content.clone());
    let mut workload = Random::seeded(seed);
    set_fault(&trial, Some(fault.clone()));
    for _ in 0..OPERATIONS {
        if let Err(error) = model.step(&image, &mut workload, what) {
            assert_eq!(error.raw_os_error(), Some(fault.code), "{what}: {error}");
        }
    }
    set_fault(&trial, None);
    // The first may report a sync that failed in another operation.
    let _ = image.flush();
    model.settle(&image, what);
    model.check(&image, what);
    for _ in 0..10 {
        model.step(&image, random, what).unwrap();
    }
    model.check(&image, what);
    let crash_position = trial.recorder.position();
    let operation = model.operation() + 1;
    image.close().unwrap();
    trial.put_down(made);
    qemu_check(&made.path, Tolerance::Leaks, what);
    check_snapshots(made, what);
    model.check(&Image::open(&made.path, &read_only()).unwrap(), what);
    // The process may also have died before it closed the image.
    trial.crash(made, crash_position, Loss::ALL[random.below(4) as usize], random);
    let what = format!("{what}, then a crash");
    qemu_check(&made.path, Tolerance::Leaks, &what);
    check_snapshots(made, &what);
    let image = Image::open(&made.path, &read_only()).unwrap();
    model.check_after_crash(&image, operation, &what);
    failed(&trial) > 0
}

fn read_only() -> OpenOptions {
    let mut options = options();
    options.access = imgfmt::Access::ReadOnly;
    options
}

fn fail_all(name: &str, lasting: &[u64]) {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new(name);
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let seed = random.next();
        let (first, end) = count_calls(&made, seed);
        let rounds = rounds("IMGFMT_ERROR_ROUNDS", 12).min(end - first);
        let step = ((end - first) / rounds).max(1);
        let mut hits = 0;
        for round in 0..rounds {
            let call = first + round * step + random.below(step);
            let code = [EIO, ENOSPC][random.below(2) as usize];
            let length = lasting[random.below(lasting.len() as u64) as usize];
            let fault = Fault { calls: call..call.saturating_add(length), code };
            let what = format!("{subject:?}, workload {seed}: {fault:?}");
            hits += u64::from(fail(&made, seed, &fault, &mut random, &what));
        }
        assert!(hits * 2 >= rounds, "{subject:?}: only {hits} of {rounds} faults came to pass");
    }
}

#[test]
fn an_error_that_comes_once_does_no_harm() {
    fail_all("errors once", &[1]);
}

#[test]
fn errors_that_last_do_no_harm() {
    fail_all("errors that last", &[2, 10, 100, u64::MAX]);
}

#[test]
fn an_image_that_cannot_be_opened_for_an_error_is_unchanged() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("errors at open");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        for call in 0.. {
            let trial = OnTrial::new(&made);
            set_fault(&trial, Some(Fault { calls: call..u64::MAX, code: EIO }));
            let opened = trial.open();
            if failed(&trial) == 0 {
                assert!(opened.is_ok());
                break;
            }
            assert!(call < 100, "{subject:?}: opening takes more than 100 calls");
            assert!(opened.is_err(), "{subject:?}: the failure of call {call} was not noticed");
            assert_eq!(trial.recorder.position(), 0, "{subject:?}: call {call}");
        }
    }
}
