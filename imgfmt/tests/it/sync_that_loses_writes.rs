//! A kernel may drop what it could not write when a sync fails. The metadata that was lost is
//! written again by the next flush: what is then durable is what the open image shows.

use imgfmt::testing::Loss;
use imgfmt::{Durability, Image, Shrink, Speed, ZeroMode};

use crate::common::{Random, at, qemu, range};
use crate::judge::subjects::{Made, OnTrial, Start, Subject, Tolerance, options, qemu_check};

const SIZE: u64 = 4 << 20;

const SUBJECTS: [Subject; 5] = [
    Subject::new("", Start::Empty),
    Subject::new("cluster_size=512", Start::Empty),
    Subject::new("cluster_size=4096,compat=0.10", Start::Used),
    Subject::new("cluster_size=4096", Start::Snapshots),
    Subject::new("cluster_size=16384,extended_l2=on", Start::Empty),
];

fn read(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(at(0), &mut bytes).unwrap();
    bytes
}

/// What a power failure leaves must be what the open image shows.
fn compare(trial: &OnTrial, made: &Made, image: &Image, random: &mut Random, what: &str) {
    trial.crash(made, trial.recorder.position(), Loss::Everything, random);
    qemu_check(&made.path, Tolerance::Leaks, what);
    let options = options().access(imgfmt::Access::ReadOnly);
    let durable = Image::open(&made.path, &options).unwrap();
    assert_eq!(durable.size(), image.size(), "{what}");
    let (found, expected) = (read(&durable), read(image));
    let place = found.iter().zip(&expected).position(|(a, b)| a != b);
    assert!(place.is_none(), "{what}: the disk differs from the open image at {place:?}");
}

fn write_some(image: &Image, random: &mut Random) {
    for _ in 0..random.below(6) + 1 {
        let offset = random.below(image.size() - 70_000);
        let length = random.below(70_000) + 1;
        let zero_mode = [ZeroMode::MayUnmap, ZeroMode::KeepAllocated][random.below(2) as usize];
        // Any of these may flush, because the cache holds next to nothing, and so fail.
        let _ = match random.below(5) {
            0 => {
                let range = range(offset, length);
                image.write_zeroes(range, zero_mode, Speed::Any, Durability::Cached)
            }
            1 => image.discard(range(offset, length), Durability::Cached),
            _ => {
                let data = vec![random.below(255) as u8 + 1; length as usize];
                image.write_at(at(offset), &data, Durability::Cached)
            }
        };
    }
}

#[test]
fn the_next_flush_writes_metadata_again_that_a_failed_sync_has_lost() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("syncs that lose");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let trial = OnTrial::new(&made);
        let image = trial.open().unwrap();
        for round in 0..10 {
            let syncs = random.below(4);
            trial.file.lose_at_sync(syncs).unwrap();
            write_some(&image, &mut random);
            let _ = image.flush();
            write_some(&image, &mut random);
            while image.flush().is_err() {}
            let what = format!("{subject:?}, round {round}, loss after {syncs} syncs");
            compare(&trial, &made, &image, &mut random, &what);
        }
        let failures = trial.file.failed();
        assert!(failures > 2, "{subject:?}: only {failures} syncs failed");
    }
}

#[test]
fn the_next_flush_writes_a_new_size_again_that_a_failed_sync_has_lost() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("a size that is lost");
    for syncs in 0..12 {
        let directory = tempfile::tempdir().unwrap();
        let subject = Subject::new("cluster_size=4096", Start::Empty);
        let made = subject.make(directory.path(), SIZE, &mut random);
        let trial = OnTrial::new(&made);
        let mut image = trial.open().unwrap();
        write_some(&image, &mut random);
        image.flush().unwrap();
        trial.file.lose_at_sync(syncs).unwrap();
        // Large enough for another L1 table.
        let _ = image.resize(4096 * SIZE, Shrink::Refuse);
        while image.flush().is_err() {}
        let what = format!("loss after {syncs} syncs");
        trial.crash(&made, trial.recorder.position(), Loss::Everything, &mut random);
        qemu_check(&made.path, Tolerance::Leaks, &what);
        let options = options().access(imgfmt::Access::ReadOnly);
        let durable = Image::open(&made.path, &options).unwrap();
        assert_eq!(durable.size(), image.size(), "{what}");
    }
}
