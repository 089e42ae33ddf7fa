//! Snapshots made, applied and deleted by us are what QEMU would have made of them.

use imgfmt::{
    Access, CreateOptions, Durability, ErrorKind, Format, Image, L2Entries, OpenOptions,
    OpenPolicy, Qcow2Version, Repair, Shrink, Speed, ZeroMode,
};

use crate::common::{Random, at, qemu, range, run, text};

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
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let mut image = Image::create(&path, &options).unwrap();
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
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut image = Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
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
    let path = directory.path().join("narrow.qcow2");
    let mut image = Image::create(&path, &narrow).unwrap();
    image.write_at(at(0), b"shared", Durability::Cached).unwrap();
    image.create_snapshot("one").unwrap();
    image.create_snapshot("two").unwrap();
    assert_eq!(image.create_snapshot("three").unwrap_err().kind(), ErrorKind::Unsupported);
    image.close().unwrap();
    if qemu::has_qemu() {
        qemu::check(&path);
    }
}

#[test]
fn a_snapshot_of_another_size_gives_the_disk_its_size() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("sizes of snapshots");
    let directory = tempfile::tempdir().unwrap();
    let (path, copy) = (directory.path().join("disk.qcow2"), directory.path().join("copy.qcow2"));
    let base = directory.path().join("base.qcow2");
    qemu::create(&base, "", "9M");
    qemu::io(&base, "qcow2", &["write -P 77 0 9M".to_owned()]);
    for (kind, has_base) in [("", false), ("cluster_size=512", false), ("extended_l2=on", true)] {
        match has_base {
            true => qemu::create_overlay(&path, kind, &base, "qcow2", "3M"),
            false => qemu::create(&path, kind, "3M"),
        }
        let writable = writable().policy(OpenPolicy::any_file());
        let mut states = Vec::new();
        let mut image = Image::open(&path, &writable).unwrap();
        for (name, size) in [("small", 3 << 20), ("odd", (7 << 20) + 512), ("tiny", 1 << 19)] {
            image.resize(size, Shrink::Allow).unwrap();
            let data = random.bytes(100_000);
            let offset = random.below(size - 100_000);
            image.write_at(at(offset), &data, Durability::Cached).unwrap();
            image.write_at(at(size - 512), &[9; 512], Durability::Cached).unwrap();
            image.create_snapshot(name).unwrap();
            states.push((name, content(&image)));
            image.write_at(at(0), &random.bytes(5000), Durability::Cached).unwrap();
        }
        image.close().unwrap();
        for _ in 0..6 {
            let (name, state) = &states[random.below(3) as usize];
            std::fs::copy(&path, &copy).unwrap();
            run("qemu-img", &["snapshot", "-a", name, text(&copy)]);
            let mut image = Image::open(&path, &writable).unwrap();
            image.apply_snapshot(name).unwrap();
            assert!(content(&image) == *state, "{kind}: {name}");
            // What is added later is zero, not what was there before.
            let size = image.size();
            image.resize(size + 300_000 / 512 * 512, Shrink::Refuse).unwrap();
            assert!(content(&image)[size as usize..].iter().all(|byte| *byte == 0));
            image.resize(size, Shrink::Allow).unwrap();
            image.close().unwrap();
            qemu::check(&path);
            assert!(qemu::content(&path, "qcow2") == *state, "QEMU, {kind}: {name}");
            assert!(qemu::content(&copy, "qcow2") == *state, "QEMU's own, {kind}: {name}");
            for (name, state) in &states {
                let options = OpenOptions::new().policy(OpenPolicy::any_file()).snapshot(*name);
                assert!(content(&Image::open(&path, &options).unwrap()) == *state);
            }
        }
    }
}

#[test]
fn sizes_that_snapshots_do_not_know_are_not_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut options = CreateOptions::new(Format::Qcow2, SIZE);
    options.version = Qcow2Version::V2;
    let mut image = Image::create(&path, &options).unwrap();
    image.create_snapshot("one").unwrap();
    let error = image.resize(SIZE * 2, Shrink::Refuse).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    // As long as the size is the same, nothing is in the way.
    image.apply_snapshot("one").unwrap();
    image.close().unwrap();

    // An old program's version 3 image: the snapshot has no size. It begins with the L1 table's
    // offset (8) and entries (4), and has 16 bytes of extra data behind 40 bytes.
    let path = directory.path().join("new.qcow2");
    let mut image = Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    image.create_snapshot("one").unwrap();
    image.close().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    bytes[table + 36..table + 40].copy_from_slice(&0_u32.to_be_bytes());
    bytes.copy_within(table + 56..table + 60, table + 40);
    std::fs::write(&path, &bytes).unwrap();
    // A repair, if there is one, writes the size that the disk has now; nothing else may change it.
    if let Ok(mut image) = Image::open(&path, &writable()) {
        let error = image.resize(1 << 40, Shrink::Refuse).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("'one'"), "{error}");
        image.close().unwrap();
        Image::open(&path, &writable()).unwrap();
    }
}
