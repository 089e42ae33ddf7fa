//! `image create`, judged by qemu-img.

use std::path::Path;

use crate::support::image::{are_equal, info, is_clean, json, ours, write};
use crate::support::{Disk, nbd_cli, peer, says};
use crate::tools;

/// Keys and values of the format-specific part of what qemu-img says.
type Facts<'a> = &'a [(&'a str, &'a str)];

#[test]
fn qemu_finds_what_was_asked_for() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let cases: &[(&[&str], Facts<'_>)] = &[
        (&[], &[("compat", "\"1.1\""), ("refcount-bits", "16"), ("extended-l2", "false")]),
        (&["--compat", "0.10"], &[("compat", "\"0.10\"")]),
        (&["--lazy-refcounts"], &[("lazy-refcounts", "true")]),
        (&["--refcount-bits", "64"], &[("refcount-bits", "64")]),
        (&["--compression-type", "zstd"], &[("compression-type", "\"zstd\"")]),
        (&["--extended-l2", "--cluster-size", "128K"], &[("extended-l2", "true")]),
    ];
    for (index, (options, expected)) in cases.iter().enumerate() {
        let path = disk.beside(&format!("{index}.qcow2"));
        let mut arguments = vec!["image", "create", "-f", "qcow2"];
        arguments.extend(*options);
        arguments.extend([path.as_str(), "1G"]);
        assert_eq!(nbd_cli(&arguments).success(), "");
        let found = info(&qemu_img, &path);
        assert_eq!(found["virtual-size"], 1 << 30);
        for (key, value) in *expected {
            let data = &found["format-specific"]["data"];
            assert_eq!(data[key].to_string(), *value, "{options:?}: {found}");
        }
        is_clean(&qemu_img, &path);
    }
}

#[test]
fn an_overlay_shows_its_backing_file() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let overlay = disk.beside("overlay.qcow2");
    nbd_cli(&["image", "create", "-f", "qcow2", "-b", "disk.img", "-F", "raw", &overlay]).success();
    let found = info(&qemu_img, &overlay);
    assert_eq!(found["backing-filename"], "disk.img");
    assert_eq!(found["backing-filename-format"], "raw");
    peer(&qemu_img, &["compare", "-f", "qcow2", "-F", "raw", &overlay, disk.path()]);
}

#[test]
fn preallocated_images_have_their_space() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let Some(allocated) = crate::support::is_sparse_here(&disk) else { return };
    for (format, when) in
        [("raw", "falloc"), ("raw", "full"), ("qcow2", "falloc"), ("qcow2", "full")]
    {
        let path = disk.beside(&format!("{format}-{when}"));
        nbd_cli(&["image", "create", "-f", format, "--preallocation", when, &path, "4M"]).success();
        assert!(allocated(&path) >= 4 << 20, "{format} {when}: {}", allocated(&path));
        assert_eq!(info(&qemu_img, &path)["virtual-size"], 4 << 20);
    }
    is_clean(&qemu_img, &disk.beside("qcow2-full"));
    let path = disk.beside("metadata");
    let create = ["image", "create", "-f", "qcow2", "--preallocation", "metadata", &path, "4M"];
    nbd_cli(&create).success();
    assert!(allocated(&path) < 4 << 20, "{}", allocated(&path));
    assert_eq!(json(&qemu_img, &["check", "--output=json", &path])["allocated-clusters"], 64);
}

#[test]
fn data_can_be_kept_in_a_file_of_its_own() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    for (option, raw) in [(None, false), (Some("--data-file-raw"), true)] {
        let (path, data) = (disk.beside(&format!("{raw}.qcow2")), disk.beside(&format!("{raw}")));
        let mut create = vec!["image", "create", "-f", "qcow2", "--data-file", &data, &path, "1M"];
        create.extend(option);
        nbd_cli(&create).success();
        write(&qemu_io, &path, "write -P 5 0 128k");
        let found = &info(&qemu_img, &path)["format-specific"]["data"];
        assert_eq!(found["data-file-raw"], raw);
        assert_eq!(found["data-file"], data.as_str());
        let ours = ours(&["info", "--json", &path]);
        assert_eq!(ours["format-specific"]["data"]["data-file-raw"], raw);
        is_clean(&qemu_img, &path);
        if raw {
            assert!(std::fs::read(&data).expect("the data")[..128 << 10] == [5; 128 << 10]);
        }
        let copy = disk.beside(&format!("{raw}.copy"));
        nbd_cli(&["image", "convert", &path, &copy]).success();
        are_equal(&qemu_img, &path, &copy);
    }
}

#[test]
fn a_file_that_exists_is_never_touched() {
    let disk = Disk::sparse();
    let other = disk.beside("other");
    std::fs::copy(disk.path(), &other).expect("a copy");
    for format in ["raw", "qcow2"] {
        let outcome = nbd_cli(&["image", "create", "-f", format, disk.path(), "1M"]);
        says(outcome, &[disk.path(), "there is a file of that name"]);
        let outcome = nbd_cli(&["image", "convert", "-O", format, disk.path(), &other]);
        says(outcome, &[&other, "there is a file of that name"]);
        let outcome = nbd_cli(&["image", "convert", "-O", format, disk.path(), disk.path()]);
        says(outcome, &[disk.path(), "shares its data with the source"]);
    }
    disk.assert_equals(disk.path());
    disk.assert_equals(&other);
}

#[test]
fn what_makes_no_sense_leaves_no_file() {
    let disk = Disk::sparse();
    let new = disk.beside("new");
    let cases: &[(&[&str], &[&str])] = &[
        (&["-f", "qcow2"], &[&new, "size of its disk is missing", "such as 10G"]),
        (&["-f", "raw", "--cluster-size", "64K", "1M"], &["raw image has no --cluster-size"]),
        (&["-f", "qcow2", "--cluster-size", "3K", "1M"], &["3072", "power of two"]),
        (&["-f", "qcow2", "--cluster-size", "4M", "1M"], &["power of two from 512 to 2 MiB"]),
        (&["-f", "qcow2", "--refcount-bits", "3", "1M"], &["3 bits", "power of two"]),
        (&["-f", "qcow2", "--compat", "0.10", "--extended-l2", "1M"], &["version 2"]),
        (&["-f", "qcow2", "--extended-l2", "--cluster-size", "4K", "1M"], &["16 KiB"]),
        (&["-f", "qcow2", "--cluster-size", "512", "7E"], &["too large", "larger"]),
        (&["-f", "raw", "--lazy-refcounts", "1M"], &["raw image has no --lazy-refcounts"]),
        (&["-f", "raw", "--preallocation", "metadata", "1M"], &["metadata is for qcow2"]),
        (&["-f", "qcow2", "--data-file", "disk.img", "1M"], &["disk.img", "file of that name"]),
        (&["-f", "qcow2", "-b", "missing", "-F", "raw", "1M"], &["missing", "no such file"]),
        (&["-f", "qcow2", "-b", "disk.img", "-F", "qcow2"], &["disk.img", "qcow2"]),
        (&["-f", "raw", "-b", "disk.img", "-F", "raw"], &["raw image cannot have a backing"]),
    ];
    for (options, parts) in cases {
        let mut arguments = vec!["image", "create", new.as_str()];
        arguments.extend(*options);
        says(nbd_cli(&arguments), parts);
        assert!(!Path::new(&new).exists(), "{options:?} left a file");
    }
}
