//! Snapshots made, applied and deleted by us are what QEMU would have made of them.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A test may fail, and says what it skips.

mod common;

use common::{Random, at, qemu, range};
use imgfmt::{
    Access, CreateOptions, Durability, ErrorKind, Format, Image, L2Entries, OpenOptions,
    Qcow2Version, Repair, Speed, ZeroMode,
};

const SIZE: u64 = 3 << 20;

fn writable() -> OpenOptions {
    OpenOptions::new().access(Access::ReadWrite)
}

fn change(image: &Image, model: &mut [u8], random: &mut Random) {
    for _ in 0..15 {
        let offset = random.below(SIZE);
        let length = random.below(150_000).min(SIZE - offset);
        let part = offset as usize..(offset + length) as usize;
        if random.below(4) == 0 {
            let zero = range(offset, length);
            image.write_zeroes(zero, ZeroMode::MayUnmap, Speed::Any, Durability::Cached).unwrap();
            model[part].fill(0);
        } else {
            let data = vec![random.below(255) as u8 + 1; length as usize];
            image.write_at(at(offset), &data, Durability::Cached).unwrap();
            model[part].copy_from_slice(&data);
        }
    }
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.size() as usize];
    image.read_at(at(0), &mut bytes).unwrap();
    bytes
}

fn kinds() -> Vec<CreateOptions> {
    let plain = || CreateOptions::new(Format::Qcow2, SIZE);
    let mut small = plain();
    small.cluster_size = 512;
    let mut narrow = plain();
    (narrow.refcount_bits, narrow.cluster_size) = (4, 4096);
    let mut old = plain();
    old.version = Qcow2Version::V2;
    let mut extended = plain();
    extended.l2_entries = L2Entries::Extended;
    vec![plain(), small, narrow, old, extended]
}

#[test]
fn snapshots_come_and_go_and_the_image_stays_sound() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("snapshots");
    for options in kinds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.qcow2");
        Image::create(&path, &options).unwrap();
        let mut image = Image::open(&path, &writable()).unwrap();
        let mut model = vec![0; SIZE as usize];
        let mut states: Vec<(String, Vec<u8>)> = Vec::new();
        for round in 0..7 {
            change(&image, &mut model, &mut random);
            match random.below(4) {
                0 | 1 => {
                    let name = format!("state {round}");
                    image.create_snapshot(&name).unwrap();
                    states.push((name, model.clone()));
                }
                2 if !states.is_empty() => {
                    let (name, state) = &states[random.below(states.len() as u64) as usize];
                    image.apply_snapshot(name).unwrap();
                    model.clone_from(state);
                }
                2 if random.below(3) == 0 => {
                    image.clear().unwrap();
                    model.fill(0);
                }
                3 if !states.is_empty() => {
                    let index = random.below(states.len() as u64) as usize;
                    let (name, _) = states.remove(index);
                    image.delete_snapshot(&name).unwrap();
                }
                _ => {}
            }
            assert!(content(&image) == model, "round {round} of {options:?}");
            image.close().unwrap();
            qemu::check(&path);
            assert!(qemu::content(&path, "qcow2") == model, "QEMU, round {round} of {options:?}");
            for (name, state) in &states {
                let image = Image::open(&path, &OpenOptions::new().snapshot(name)).unwrap();
                assert!(content(&image) == *state, "{name} in round {round} of {options:?}");
            }
            let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
            assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.messages);
            image = Image::open(&path, &writable()).unwrap();
            let known = image.info().unwrap().qcow2.unwrap().snapshots;
            let known: Vec<_> = known.into_iter().map(|snapshot| snapshot.name).collect();
            assert_eq!(known, states.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
        }
    }
}

#[test]
fn snapshots_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    let mut image = Image::open(&path, &writable()).unwrap();
    image.create_snapshot("one").unwrap();
    assert_eq!(image.create_snapshot("one").unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(image.apply_snapshot("two").unwrap_err().kind(), ErrorKind::NotFound);
    let lease = image.map_read(range(0, 512)).unwrap();
    assert_eq!(image.delete_snapshot("one").unwrap_err().kind(), ErrorKind::Busy);
    drop(lease);
    image.delete_snapshot("one").unwrap();
    image.close().unwrap();
    let mut narrow = CreateOptions::new(Format::Qcow2, SIZE);
    narrow.refcount_bits = 2;
    let path = folder.path().join("narrow.qcow2");
    Image::create(&path, &narrow).unwrap();
    let mut image = Image::open(&path, &writable()).unwrap();
    image.write_at(at(0), b"shared", Durability::Cached).unwrap();
    image.create_snapshot("one").unwrap();
    image.create_snapshot("two").unwrap();
    assert_eq!(image.create_snapshot("three").unwrap_err().kind(), ErrorKind::Unsupported);
    image.close().unwrap();
    if qemu::has_qemu() {
        qemu::check(&path);
    }
}
