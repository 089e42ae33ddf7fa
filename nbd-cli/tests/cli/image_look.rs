//! `image info`, `map`, `measure`, `compare` and `check` beside qemu-img's.

use std::process::Command;

use serde_json::Value;

use crate::support::image::{chain, info, json, ours, write};
use crate::support::{Disk, PROGRAM, nbd_cli, peer, run, says};
use crate::tools;

#[test]
fn info_has_the_facts_of_qemu_img() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let lazy = disk.beside("lazy.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", &lazy, "1G"]);
    let old = disk.beside("old.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", &old, "1G"]);
    for path in [disk.path(), &overlay, &lazy, &old] {
        let (found, theirs) = (ours(&["info", "--json", path]), info(&qemu_img, path));
        for key in [
            "filename",
            "format",
            "virtual-size",
            "actual-size",
            "cluster-size",
            "dirty-flag",
            "backing-filename",
            "full-backing-filename",
            "backing-filename-format",
        ] {
            assert_eq!(found.get(key), theirs.get(key), "{key} of {path}");
        }
        if found["format"] == "qcow2" {
            for key in ["compat", "lazy-refcounts", "refcount-bits", "corrupt", "extended-l2"] {
                let data = |info: &Value| info["format-specific"]["data"].get(key).cloned();
                // Version 2 images have only some of them.
                if let Some(theirs) = data(&theirs) {
                    assert_eq!(data(&found), Some(theirs), "{key} of {path}");
                }
            }
        }
    }
    let layers = ours(&["info", "--json", "--backing-chain", &overlay]);
    let sizes: Vec<_> = layers.as_array().expect("layers").iter().map(|l| &l["format"]).collect();
    assert_eq!(sizes, ["qcow2", "qcow2", "raw"]);
    let text = nbd_cli(&["image", "info", &overlay]).success();
    for part in ["overlay.qcow2", "8.0 MiB (8388608 bytes)", "64K", "middle.qcow2"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn info_opens_no_file_that_the_image_names() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    for name in ["/etc/passwd", "missing", "nbd://localhost/x", "json:{}"] {
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "1M"]);
        peer(&qemu_img, &["rebase", "-u", "-b", name, "-F", "raw", &image]);
        let found = ours(&["info", "--json", &image]);
        assert_eq!(found["backing-filename"], name);
        nbd_cli(&["image", "check", &image]).success();
        let outcome = nbd_cli(&["image", "map", &image]);
        assert!(outcome.failure().contains(name), "{name}");
    }
}

#[test]
fn the_map_is_that_of_qemu_img() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let compressed = disk.beside("compressed.qcow2");
    peer(&qemu_img, &["convert", "-c", "-O", "qcow2", disk.path(), &compressed]);
    for path in [disk.path(), &overlay, &disk.beside("middle.qcow2"), &compressed] {
        let found = ours(&["map", "--json", path]);
        let theirs = json(&qemu_img, &["map", "--output=json", path]);
        assert_eq!(bytes_of(&found), bytes_of(&theirs), "{path}");
    }
    let text = nbd_cli(&["image", "map", &overlay]).success();
    assert!(text.lines().any(|line| line.ends_with("zero")), "{text}");
    assert!(text.lines().any(|line| line.contains("  1  data  ")), "{text}");
}

/// What every 512 bytes of a map are, however they are put together.
fn bytes_of(map: &Value) -> Vec<(u64, String)> {
    let mut sectors = Vec::new();
    for part in map.as_array().expect("a list") {
        let number = |key: &str| part[key].as_u64().expect("a number");
        let (start, length) = (number("start"), number("length"));
        for at in (0..length).step_by(512) {
            // Where there is no data the place does not matter.
            let is_data = part["data"] == true;
            let place = part["offset"].as_u64().filter(|_| is_data).map(|offset| offset + at);
            let what = format!(
                "{} {} {} {} {} {place:?}",
                part["depth"], part["present"], part["zero"], part["data"], part["compressed"]
            );
            sectors.push((start + at, what));
        }
    }
    sectors
}

#[test]
fn the_measures_are_those_of_qemu_img() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let same = |ours_: &[&str], theirs: &[&str]| {
        let found = ours(&[&["measure", "--json"], ours_].concat());
        let expected = json(&qemu_img, &[&["measure", "--output=json"], theirs].concat());
        for key in ["required", "fully-allocated"] {
            assert_eq!(found[key], expected[key], "{key}: {ours_:?}");
        }
    };
    for path in [disk.path(), &overlay] {
        same(&["-O", "raw", path], &["-O", "raw", path]);
        same(&["-O", "qcow2", path], &["-O", "qcow2", path]);
        let wide = ["-O", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path];
        let narrow = ["-O", "qcow2", "--cluster-size", "512", "--refcount-bits", "64", path];
        same(&narrow, &wide);
    }
    for size in ["1", "1G", "1000000", "5T"] {
        same(&["-O", "qcow2", "--size", size], &["-O", "qcow2", "--size", size]);
    }
    let theirs = ["-O", "qcow2", "-o", "extended_l2=on", "--size", "1T"];
    same(&["-O", "qcow2", "--extended-l2", "--size", "1T"], &theirs);
    says(
        nbd_cli(&["image", "measure", "-O", "qcow2", "--cluster-size", "1", "--size", "1"]),
        &["--cluster-size 1"],
    );
}

#[test]
fn compare_tells_by_its_exit_code() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let (flat, copy) = (disk.beside("flat.img"), disk.beside("copy.qcow2"));
    peer(&qemu_img, &["convert", &overlay, &flat]);
    peer(&qemu_img, &["convert", "-c", "-O", "qcow2", disk.path(), &copy]);
    let compare = |arguments: &[&str]| nbd_cli(&[&["image", "compare"], arguments].concat());
    assert_eq!(compare(&[&overlay, &flat]).success(), "the disks are the same\n");
    compare(&[disk.path(), &copy]).success();
    let differs = compare(&["--json", &overlay, disk.path()]);
    assert_eq!(differs.code, Some(1), "{differs:?}");
    let report: Value = serde_json::from_str(&differs.stdout).expect("JSON");
    let theirs = run(Command::new(&qemu_img).args(["compare", &overlay, disk.path()])).stdout;
    let sentence = format!("mismatch at offset {}!", report["mismatch-offset"]);
    assert!(theirs.contains(&sentence), "{theirs}: {report}");
    nbd_cli(&["image", "resize", &copy, "9M"]).success();
    let larger = compare(&[&copy, disk.path()]);
    assert!(larger.stderr.contains("8388608"), "{larger:?}");
    assert_eq!(larger.code, Some(0));
    assert_eq!(compare(&["--strict", &copy, disk.path()]).code, Some(1));
    let missing = compare(&[&copy, &disk.beside("missing")]);
    assert_eq!(missing.code, Some(2), "{missing:?}");
    assert!(missing.stderr.contains("no such file"), "{missing:?}");
    assert_eq!(compare(&[&copy]).code, Some(2), "wrong usage is not a difference");
}

#[test]
fn check_finds_and_repairs_what_qemu_img_finds() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    same_report(&qemu_img, &image, 0);
    // A lost reference: the L1 entry.
    let clean = std::fs::read(&image).expect("the image");
    let l1 = u64::from_be_bytes(clean[40..48].try_into().expect("8 bytes")) as usize;
    let mut bytes = clean.clone();
    bytes[l1..l1 + 8].fill(0);
    std::fs::write(&image, &bytes).expect("room");
    same_report(&qemu_img, &image, 3);
    let text = nbd_cli(&["image", "check", &image]).stdout;
    assert!(text.contains("leaks, 0 corruptions"), "{text}");
    let repaired = nbd_cli(&["image", "check", "--repair", "leaks", &image]).success();
    assert!(repaired.contains("no errors were found"), "{repaired}");
    same_report(&qemu_img, &image, 0);
    // A lost refcount.
    let table = u64::from_be_bytes(clean[48..56].try_into().expect("8 bytes")) as usize;
    let block = u64::from_be_bytes(clean[table..table + 8].try_into().expect("8 bytes")) as usize;
    let mut bytes = clean.clone();
    bytes[block + 12..block + 14].fill(0);
    std::fs::write(&image, &bytes).expect("room");
    same_report(&qemu_img, &image, 2);
    assert!(std::fs::read(&image).expect("the image") == bytes, "a check changes nothing");
    let leaks_only = nbd_cli(&["image", "check", "-r", "leaks", &image]);
    assert_eq!(leaks_only.code, Some(2), "{leaks_only:?}");
    nbd_cli(&["image", "check", "--repair", "all", &image]).success();
    same_report(&qemu_img, &image, 0);
    peer(&qemu_img, &["compare", &image, disk.path()]);
    write(&qemu_io, &image, "write -P 1 0 64k");
}

#[test]
fn a_repair_keeps_snapshots_beside_bitmaps() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("both.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "1M"]);
    peer(&qemu_img, &["bitmap", "--add", &image, "b0"]);
    peer(&qemu_img, &["snapshot", "-c", "s1", &image]);
    nbd_cli(&["image", "check", "--repair", "all", &image]).success();
    let found = info(&qemu_img, &image);
    assert_eq!(found["snapshots"][0]["name"], "s1", "{found}");
    assert_eq!(found["format-specific"]["data"]["bitmaps"][0]["name"], "b0", "{found}");
}

#[track_caller]
fn same_report(qemu_img: &std::path::Path, image: &str, code: i32) {
    let found = nbd_cli(&["image", "check", "--json", image]);
    assert_eq!(found.code, Some(code), "{found:?}");
    let theirs = run(Command::new(qemu_img).args(["check", "--output=json", image]));
    assert_eq!(theirs.code, Some(code), "{theirs:?}");
    let parse = |text: &str| -> Value { serde_json::from_str(text).expect("JSON") };
    let (found, theirs) = (parse(&found.stdout), parse(&theirs.stdout));
    for key in ["filename", "format", "check-errors", "leaks", "total-clusters", "image-end-offset"]
    {
        assert_eq!(found.get(key), theirs.get(key), "{key}: {found} {theirs}");
    }
    assert_eq!(found.get("corruptions").is_some(), theirs.get("corruptions").is_some());
}

#[test]
fn a_difference_or_damage_is_not_success_where_the_report_cannot_be_written() {
    let disk = Disk::sparse();
    let (other, image) = (disk.beside("other.img"), disk.beside("image.qcow2"));
    let mut bytes = std::fs::read(disk.path()).expect("the disk");
    bytes[5000] ^= 1;
    std::fs::write(&other, bytes).expect("room");
    nbd_cli(&["image", "convert", "-O", "qcow2", disk.path(), &image]).success();
    // The L1 entry is lost, and leaves leaks.
    let mut bytes = std::fs::read(&image).expect("the image");
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().expect("8 bytes")) as usize;
    bytes[l1..l1 + 8].fill(0);
    std::fs::write(&image, bytes).expect("room");
    for (arguments, code) in [
        (&["image", "compare", disk.path(), &other][..], 1),
        (&["image", "compare", "--json", disk.path(), &other], 1),
        (&["image", "check", &image], 3),
        (&["image", "check", "--json", &image], 3),
        (&["image", "compare", disk.path(), disk.path()], 0),
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let outcome = Command::new(PROGRAM).args(arguments).stdout(writer).output();
        let outcome = outcome.expect("nbd-cli");
        assert_eq!(outcome.status.code(), Some(code), "{arguments:?}: {outcome:?}");
        assert!(outcome.stderr.is_empty(), "{arguments:?}: {outcome:?}");
    }
}

#[test]
fn what_cannot_be_checked_has_a_code_of_its_own() {
    let disk = Disk::sparse();
    let outcome = nbd_cli(&["image", "check", disk.path()]);
    assert_eq!(outcome.code, Some(63), "{outcome:?}");
    assert!(outcome.stderr.contains("no metadata to check"), "{outcome:?}");
    let outcome = nbd_cli(&["image", "check", &disk.beside("missing")]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
}
