//! Bitmaps that QEMU made, kept by us and read by QEMU again, and the other way round.

use std::path::Path;

use imgfmt::{
    Access, BitmapChange, BitmapState, Durability, Image, OpenOptions, Recording, Shrink, Speed,
    ZeroMode,
};

use crate::common::bitmaps::{Model, dirty, dirty_in};
use crate::common::{Random, at, qemu, range, run, text};

fn open(path: &Path) -> Image {
    Image::open(path, &OpenOptions::new().access(Access::ReadWrite)).unwrap()
}

/// One random change of a disk, noted in the models.
fn change(image: &Image, random: &mut Random, models: &mut [&mut Model]) {
    let size = image.size();
    let offset = random.below(size / 512) * 512;
    let length = ((random.below(400) + 1) * 512).min(size - offset);
    let whole = range(offset, length);
    match random.below(5) {
        0 => image.write_zeroes(whole, ZeroMode::MayUnmap, Speed::Any, Durability::Cached).unwrap(),
        1 => image.discard(whole, Durability::Cached).unwrap(),
        2 => {
            image.write_at(at(offset), &random.bytes(length as usize), Durability::Fua).unwrap();
        }
        _ => {
            image.write_at(at(offset), &random.bytes(length as usize), Durability::Cached).unwrap();
        }
    }
    models.iter_mut().for_each(|model| model.set(offset, length));
}

#[test]
fn bitmaps_of_qemu_are_kept_and_given_back() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let size: u64 = (48 << 20) + 512 * 5;
    let mut random = Random::new("bitmaps_of_qemu_are_kept_and_given_back");
    for options in ["", "cluster_size=4k", "extended_l2=on"] {
        let _ = std::fs::remove_file(&path);
        qemu::create(&path, options, &size.to_string());
        run("qemu-img", &["bitmap", "--add", "-g", "64k", text(&path), "coarse"]);
        run("qemu-img", &["bitmap", "--add", "-g", "512", text(&path), "fine"]);
        run("qemu-img", &["bitmap", "--add", "--disable", text(&path), "still"]);
        qemu::io(&path, "qcow2", &["write 1M 64k".into(), "write 40M 1k".into()]);
        let (mut coarse, mut fine) = (Model::new(size, 65536), Model::new(size, 512));
        for (offset, length) in [(1 << 20, 65536), (40 << 20, 1024)] {
            coarse.set(offset, length);
            fine.set(offset, length);
        }
        assert_eq!(dirty_in(&path, "coarse"), coarse.dirty());
        for _ in 0..2 {
            let image = open(&path);
            for _ in 0..20 {
                change(&image, &mut random, &mut [&mut coarse, &mut fine]);
            }
            assert_eq!(dirty(&image, "coarse"), coarse.dirty());
            assert_eq!(dirty(&image, "fine"), fine.dirty());
            image.close().unwrap();
            qemu::check(&path);
            assert_eq!(qemu::dirty(&path, "coarse"), coarse.dirty());
            assert_eq!(qemu::dirty(&path, "fine"), fine.dirty());
            assert_eq!(qemu::dirty(&path, "still"), []);
        }
        // QEMU goes on with what we have left.
        qemu::io(&path, "qcow2", &["write 7M 3k".into()]);
        coarse.set(7 << 20, 3072);
        assert_eq!(qemu::dirty(&path, "coarse"), coarse.dirty());
        assert_eq!(dirty_in(&path, "coarse"), coarse.dirty());
        assert_eq!(dirty_in(&path, "still"), []);
    }
}

#[test]
fn bitmaps_of_ours_are_those_that_qemu_would_have_made() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let size: u64 = 10 << 20;
    qemu::create(&path, "", &size.to_string());
    let image = open(&path);
    image.add_bitmap("eins", 4096, Recording::Enabled).unwrap();
    image.add_bitmap("zwei", 65536, Recording::Disabled).unwrap();
    image.write_at(at(5000), &[1; 5000], Durability::Cached).unwrap();
    image.close().unwrap();
    qemu::check(&path);
    assert_eq!(qemu::dirty(&path, "eins"), [(4096, 8192)]);
    run("qemu-img", &["bitmap", "--merge", "eins", text(&path), "zwei"]);
    run("qemu-img", &["bitmap", "--clear", text(&path), "eins"]);
    run("qemu-img", &["bitmap", "--disable", text(&path), "eins"]);
    assert_eq!(dirty_in(&path, "zwei"), [(0, 65536)]);
    let image = open(&path);
    let name = || "eins".to_owned();
    image
        .bitmap_transaction(&[
            BitmapChange::Enable { name: name() },
            BitmapChange::Merge { into: name(), from: "zwei".into() },
            BitmapChange::Remove { name: "zwei".into() },
        ])
        .unwrap();
    image.close().unwrap();
    qemu::check(&path);
    qemu::io(&path, "qcow2", &["write 1M 1".into()]);
    assert_eq!(qemu::dirty(&path, "eins"), [(0, 65536), (1 << 20, 4096)]);
    let image = open(&path);
    image.remove_bitmap("eins").unwrap();
    image.close().unwrap();
    qemu::check(&path);
    assert!(!run("qemu-img", &["info", text(&path)]).contains("bitmaps"));
}

#[test]
fn a_bitmap_that_was_in_use_is_not_believed_until_it_is_repaired() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (path, copy) = (directory.path().join("disk.qcow2"), directory.path().join("copy.qcow2"));
    qemu::create(&path, "", "10M");
    let image = open(&path);
    image.add_bitmap("used", 65536, Recording::Enabled).unwrap();
    image.add_bitmap("still", 65536, Recording::Disabled).unwrap();
    image.write_at(at(0), &[1; 5000], Durability::Fua).unwrap();
    // As a killed process would leave it.
    std::fs::copy(&path, &copy).unwrap();
    drop(image);
    qemu::check_but_for_leaks(&copy, "the killed one");
    assert!(run("qemu-img", &["info", text(&copy)]).contains("in-use"));
    assert_eq!(qemu::dirty(&copy, "still"), []);
    let image = open(&copy);
    let used = image.bitmaps().into_iter().find(|bitmap| bitmap.name == "used").unwrap();
    assert!(matches!(used.state, BitmapState::Inconsistent { .. }), "{used:?}");
    assert!(image.dirty_extents("used", range(0, 512), 1).is_err());
    image.write_at(at(0), &[2; 5000], Durability::Fua).unwrap();
    image.bitmap_transaction(&[BitmapChange::Repair { name: "used".into() }]).unwrap();
    image.close().unwrap();
    qemu::check_but_for_leaks(&copy, "the repaired one");
    assert_eq!(qemu::dirty(&copy, "used"), [(0, 10 << 20)]);
}

#[test]
fn bitmaps_of_a_resized_disk_are_those_of_qemu() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    qemu::create(&path, "cluster_size=512", "3M");
    let mut image = open(&path);
    image.add_bitmap("some", 512, Recording::Enabled).unwrap();
    image.add_bitmap("other", 65536, Recording::Disabled).unwrap();
    image.write_at(at((3 << 20) - 1000), &[1; 1000], Durability::Cached).unwrap();
    image.write_at(at(0), &[1; 1000], Durability::Cached).unwrap();
    let end = ((3 << 20) - 1024, 1024);
    image.resize(9 << 20, Shrink::Refuse).unwrap();
    assert_eq!(dirty(&image, "some"), [(0, 1024), end]);
    image.write_at(at((8 << 20) + 1), &[1; 1], Durability::Cached).unwrap();
    image.close().unwrap();
    qemu::check(&path);
    assert_eq!(qemu::dirty(&path, "some"), [(0, 1024), end, (8 << 20, 512)]);
    let mut image = open(&path);
    image.resize(1 << 20, Shrink::Allow).unwrap();
    image.resize(2 << 20, Shrink::Refuse).unwrap();
    // What was cut off and came back as zeroes has changed. QEMU says that it has not.
    assert_eq!(dirty(&image, "some"), [(0, 1024), (1 << 20, 1 << 20)]);
    image.close().unwrap();
    qemu::check(&path);
    assert_eq!(qemu::dirty(&path, "some"), [(0, 1024), (1 << 20, 1 << 20)]);
    assert_eq!(qemu::dirty(&path, "other"), []);
}

#[test]
fn opening_for_writing_and_changing_nothing_leaves_the_file_as_it_is() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    qemu::create(&path, "", "1M");
    run("qemu-img", &["bitmap", "--add", text(&path), "bitmap"]);
    let before = std::fs::read(&path).unwrap();
    open(&path).close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
}
