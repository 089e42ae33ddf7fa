//! Our check finds what qemu-img's finds, and our repair makes images that qemu-img finds sound.

use std::path::Path;
use std::process::Command;

use imgfmt::{Access, ErrorKind, Image, OpenOptions, Repair};

use crate::common::{self, Random, qemu};

/// A number of qemu-img's JSON report.
fn reported(path: &Path, key: &str) -> u64 {
    let output =
        Command::new("qemu-img").args(["check", "--output=json"]).arg(path).output().unwrap();
    let report = String::from_utf8(output.stdout).unwrap();
    let Some((_, rest)) = report.split_once(&format!("\"{key}\": ")) else { return 0 };
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

fn made(directory: &Path, options: &str, random: &mut Random) -> std::path::PathBuf {
    let path = directory.join("disk.qcow2");
    let _ = std::fs::remove_file(&path);
    qemu::create(&path, options, "3M");
    qemu::io(&path, "qcow2", &qemu::random_commands(random, 3 << 20, 30));
    common::run("qemu-img", &["snapshot", "-c", "one", common::text(&path)]);
    qemu::io(&path, "qcow2", &qemu::random_commands(random, 3 << 20, 10));
    path
}

#[test]
fn sound_images_of_every_kind_are_found_sound() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("check");
    for options in ["", "cluster_size=512", "extended_l2=on", "compat=0.10", "refcount_bits=64"] {
        let path = made(directory.path(), options, &mut random);
        if options.is_empty() {
            common::run("qemu-img", &["bitmap", "--add", common::text(&path), "bitmap"]);
        }
        let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{options}: {:?}", report.messages);
        for (ours, theirs) in [
            (report.total_clusters, "total-clusters"),
            (report.allocated_clusters, "allocated-clusters"),
            (report.image_end_offset, "image-end-offset"),
        ] {
            assert_eq!(ours, reported(&path, theirs), "{options}: {theirs}");
        }
    }
}

#[test]
fn damaged_refcounts_are_counted_and_repaired() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("repair");
    for _ in 0..10 {
        let path = made(directory.path(), "cluster_size=4096", &mut random);
        let expected = qemu::content(&path, "qcow2");
        let mut bytes = std::fs::read(&path).unwrap();
        let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
        let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
        for _ in 0..5 {
            // The first clusters hold the tables that the repair itself needs.
            let place = block + (20 + random.below(300) as usize) * 2;
            bytes[place + 1] = random.below(4) as u8;
        }
        std::fs::write(&path, &bytes).unwrap();
        let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
        assert_eq!(report.leaks, reported(&path, "leaks"), "{:?}", report.messages);
        assert_eq!(report.corruptions, reported(&path, "corruptions"), "{:?}", report.messages);
        assert!(std::fs::read(&path).unwrap() == bytes, "a mere check changed the image");
        let report = Image::check_file(&path, &OpenOptions::new(), Repair::All).unwrap();
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.messages);
        qemu::check(&path);
        assert!(qemu::content(&path, "qcow2") == expected, "the repair changed the disk");
    }
}

#[test]
fn an_image_that_was_not_closed_is_repaired_when_it_is_opened_for_writing() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    qemu::create(&path, "lazy_refcounts=on,cluster_size=4096", "3M");
    // qemu-io aborts and leaves the dirty bit and refcounts that were never written.
    let _ = Command::new("qemu-io")
        .args(["-c", "write -P 6 0 500k", "-c", "flush", "-c", "abort"])
        .arg(&path)
        .output();
    let options = OpenOptions::new().access(Access::ReadWrite);
    let before = Image::open(&path, &OpenOptions::new()).unwrap();
    assert!(before.info().unwrap().qcow2.unwrap().is_dirty);
    let mut byte = [0];
    before.read_at(common::at(1000), &mut byte).unwrap();
    assert_eq!(byte, [6]);
    drop(before);
    let image = Image::open(&path, &options).unwrap();
    assert!(!image.info().unwrap().qcow2.unwrap().is_dirty);
    image.write_at(common::at(600 << 10), &[7; 100_000], Default::default()).unwrap();
    image.close().unwrap();
    qemu::check(&path);
    qemu::io(&path, "qcow2", &["read -P 6 0 500k".into(), "read -P 7 600k 64k".into()]);
}

#[test]
fn images_that_we_would_damage_are_not_opened_for_writing() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let options = OpenOptions::new().access(Access::ReadWrite);
    qemu::create(&path, "", "1M");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[79] = 2; // incompatible features: corrupt
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(Image::open(&path, &options).unwrap_err().kind(), ErrorKind::Corrupt);
    Image::open(&path, &OpenOptions::new()).unwrap();
    Image::check_file(&path, &OpenOptions::new(), Repair::All).unwrap();
    Image::open(&path, &options).unwrap();
}

/// Runs our repair, twice; the second time it must find nothing.
fn repair_all(path: &Path, what: &str) -> imgfmt::CheckReport {
    let first = Image::check_file(path, &OpenOptions::new(), Repair::All).unwrap();
    let second = Image::check_file(path, &OpenOptions::new(), Repair::All).unwrap();
    let found = (second.leaks_repaired, second.corruptions_repaired);
    assert_eq!(found, (0, 0), "{what}: the second repair found {:?}", second.messages);
    assert_eq!((first.leaks, first.corruptions), (second.leaks, second.corruptions), "{what}");
    first
}

#[test]
fn images_of_version_2_are_repaired_clean_ones_included() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("repair of version 2");
    let path = made(directory.path(), "compat=0.10", &mut random);
    let sound = std::fs::read(&path).unwrap();
    let report = repair_all(&path, "clean");
    assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.messages);
    assert!(std::fs::read(&path).unwrap() == sound, "the repair changed a clean image");
    let mut bytes = sound;
    bytes.resize(bytes.len() + (64 << 10), 0);
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
    let last = (bytes.len() >> 16) - 1;
    bytes[block + last * 2 + 1] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let report = repair_all(&path, "a leak");
    assert_eq!((report.leaks_repaired, report.leaks, report.corruptions), (1, 0, 0));
    qemu::check(&path);
}

/// Overwrites words of an image: place, length in bytes, value.
fn patch(path: &Path, patches: &[(usize, usize, u64)]) {
    let mut bytes = std::fs::read(path).unwrap();
    for (place, length, value) in patches {
        let value = value.to_be_bytes();
        bytes[*place..place + length].copy_from_slice(&value[8 - length..]);
    }
    std::fs::write(path, &bytes).unwrap();
}

#[test]
fn damage_of_header_fields_that_qemu_repairs_is_repaired() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("damaged header fields");
    let cases: [(&str, (usize, usize, u64)); 6] = [
        ("a refcount table of 0 clusters", (56, 4, 0)),
        ("a refcount table behind the end", (48, 8, 1 << 30)),
        ("a refcount table that is the header", (48, 8, 0)),
        ("two snapshots too many", (60, 4, 3)),
        ("more snapshots than there may be", (60, 4, 70_000)),
        ("a snapshot table behind the end", (64, 8, 1 << 30)),
    ];
    for (what, change) in cases {
        let path = made(directory.path(), "cluster_size=4096", &mut random);
        let expected = qemu::content(&path, "qcow2");
        patch(&path, &[change]);
        let found = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
        assert!(found.corruptions > 0, "{what}");
        let report = repair_all(&path, what);
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{what}: {:?}", report.messages);
        qemu::check(&path);
        assert!(qemu::content(&path, "qcow2") == expected, "{what}: the disk is another");
    }
}

#[test]
fn an_incomplete_entry_of_the_snapshot_table_is_found_and_completed() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("incomplete snapshot");
    let path = made(directory.path(), "cluster_size=4096", &mut random);
    let bytes = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    // No extra data: what was it is the name's padding now.
    patch(&path, &[(table + 36, 4, 0)]);
    let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
    assert_eq!(report.corruptions, 1, "{:?}", report.messages);
    assert_eq!(reported(&path, "corruptions"), 1);
    repair_all(&path, "incomplete");
    qemu::check(&path);
}

#[test]
fn an_end_mark_of_header_extensions_with_a_length_is_found_and_repaired() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("end mark");
    let path = made(directory.path(), "cluster_size=4096", &mut random);
    let expected = qemu::content(&path, "qcow2");
    patch(&path, &[(112, 8, 0x2000)]);
    let found = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
    assert_eq!(found.corruptions, 1, "{:?}", found.messages);
    repair_all(&path, "end mark");
    qemu::check(&path);
    assert!(qemu::content(&path, "qcow2") == expected);
}

#[test]
fn a_table_behind_the_end_of_the_file_gives_nothing_away() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("L1 behind the end");
    let path = made(directory.path(), "cluster_size=4096", &mut random);
    let expected = qemu::content(&path, "qcow2");
    let l1 = u64::from_be_bytes(std::fs::read(&path).unwrap()[40..48].try_into().unwrap());
    patch(&path, &[(40, 8, 1 << 30)]);
    let report = repair_all(&path, "L1 behind the end");
    // What the lost table refers to is not known, so it keeps its refcounts.
    assert!(report.corruptions > 0 && report.leaks_repaired == 0, "{report:?}");
    patch(&path, &[(40, 8, l1)]);
    qemu::check(&path);
    assert!(qemu::content(&path, "qcow2") == expected);
}
