//! Bitmaps of disks that become larger and smaller between writes, against a model and QEMU.

use std::path::Path;

use imgfmt::{Access, Durability, Image, OpenOptions, Shrink, Speed, ZeroMode};

use crate::common::bitmaps::{Model, dirty};
use crate::common::{self, Random, qemu, run, text};

const SIZE: u64 = 3 << 20;

fn open(path: &Path) -> Image {
    Image::open(path, &OpenOptions::new().access(Access::ReadWrite)).unwrap()
}

/// A bitmap, its model, and whether it notes changes.
struct Subject {
    name: &'static str,
    model: Model,
    is_enabled: bool,
}

fn subjects() -> Vec<Subject> {
    let of = |name, granularity, is_enabled| {
        let model = Model::new(SIZE, granularity);
        Subject { name, model, is_enabled }
    };
    vec![of("fine", 512, true), of("coarse", 65536, true), of("still", 4096, false)]
}

fn write(image: &Image, subjects: &mut [Subject], random: &mut Random) {
    let size = image.size();
    let offset = random.below(size / 512) * 512;
    let length = ((random.below(300) + 1) * 512).min(size - offset);
    let whole = common::range(offset, length);
    match random.below(4) {
        0 => image.write_zeroes(whole, ZeroMode::MayUnmap, Speed::Any, Durability::Cached).unwrap(),
        1 => image.discard(whole, Durability::Fua).unwrap(),
        _ => {
            let data = random.bytes(length as usize);
            image.write_at(common::at(offset), &data, Durability::Cached).unwrap();
        }
    }
    let enabled = subjects.iter_mut().filter(|subject| subject.is_enabled);
    enabled.for_each(|subject| subject.model.set(offset, length));
}

/// What is added is clean unless it was cut off since the image was opened: that is zero now.
fn resize(image: &mut Image, subjects: &mut [Subject], peak: &mut u64, random: &mut Random) {
    let old = image.size();
    let steps = (random.below(2000) + 1) * 512;
    let size = match random.below(2) {
        0 => old + steps,
        _ => old.saturating_sub(steps).max(4096),
    };
    image.resize(size, Shrink::Allow).unwrap();
    for subject in subjects {
        subject.model.resize(size);
        if subject.is_enabled {
            subject.model.set(old, size.min(*peak).saturating_sub(old));
        }
    }
    *peak = size.max(*peak);
}

/// Goes back to a snapshot of any size: everything may be different then.
fn apply(image: &mut Image, subjects: &mut [Subject], peak: &mut u64, name: &str) {
    image.apply_snapshot(name).unwrap();
    let size = image.size();
    for subject in subjects {
        subject.model.resize(size);
        if subject.is_enabled {
            subject.model.set(0, size);
        }
    }
    *peak = size.max(*peak);
}

fn compare(image: &Image, subjects: &[Subject], what: &str) {
    for subject in subjects {
        assert_eq!(dirty(image, subject.name), subject.model.dirty(), "{what}: {}", subject.name);
    }
}

#[test]
fn bits_are_kept_through_any_row_of_sizes() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("bitmaps_resized");
    for options in ["", "cluster_size=512", "cluster_size=4k,extended_l2=off", "extended_l2=on"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        qemu::create(&path, options, &SIZE.to_string());
        let mut subjects = subjects();
        for subject in &subjects {
            let granularity = subject.model.granularity.to_string();
            let arguments = ["bitmap", "--add", "-g", &granularity, text(&path), subject.name];
            run("qemu-img", &arguments);
        }
        // The one that is to stay as it is has something in it.
        qemu::io(&path, "qcow2", &["write 1M 100k".into(), format!("write {} 1k", SIZE - 1024)]);
        run("qemu-img", &["bitmap", "--disable", text(&path), "still"]);
        for subject in &mut subjects {
            subject.model.set(1 << 20, 100 << 10);
            subject.model.set(SIZE - 1024, 1024);
        }
        for round in 0..3 {
            let mut image = open(&path);
            let mut peak = image.size();
            let name = format!("round {round}");
            image.create_snapshot(&name).unwrap();
            for step in 0..15 {
                match random.below(12) {
                    0 => apply(&mut image, &mut subjects, &mut peak, &name),
                    1..=4 => resize(&mut image, &mut subjects, &mut peak, &mut random),
                    _ => write(&image, &mut subjects, &mut random),
                }
                compare(&image, &subjects, &format!("{options}, round {round}, step {step}"));
            }
            image.close().unwrap();
            qemu::check_but_for_leaks(&path, options);
            for subject in &subjects {
                let found = qemu::dirty(&path, subject.name);
                assert_eq!(found, subject.model.dirty(), "{options}, {round}, {}", subject.name);
            }
            compare(&open(&path), &subjects, &format!("{options}, round {round}, opened again"));
        }
    }
}
