//! `image convert` both ways, judged by qemu-img.

use std::path::Path;

use crate::serve_cache::has_direct_io;
use crate::support::image::{are_equal, chain, changed_since_snapshot, info, is_clean};
use crate::support::{Disk, PROGRAM, nbd_cli, peer, says};
use crate::tools;

#[test]
fn raw_becomes_every_kind_of_qcow2() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let kinds: &[&[&str]] = &[
        &[],
        &["--compress"],
        &["--compress", "--compression-type", "zstd"],
        &["--cluster-size", "512"],
        &["--cluster-size", "2M", "--compress"],
        &["--extended-l2", "--jobs", "1"],
        &["--compat", "0.10", "--jobs", "8"],
    ];
    for (index, kind) in kinds.iter().enumerate() {
        let (path, back) =
            (disk.beside(&format!("{index}.qcow2")), disk.beside(&format!("{index}")));
        let mut arguments = vec!["image", "convert", "-O", "qcow2"];
        arguments.extend(*kind);
        arguments.extend([disk.path(), path.as_str()]);
        assert_eq!(nbd_cli(&arguments).success(), "", "{kind:?}");
        is_clean(&qemu_img, &path);
        are_equal(&qemu_img, &path, disk.path());
        nbd_cli(&["image", "convert", &path, &back]).success();
        disk.assert_equals(&back);
    }
}

#[test]
fn disks_that_end_anywhere_are_compressed_and_end_with_a_sector() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (odd, path) = (disk.beside("odd.img"), disk.beside("odd.qcow2"));
    let content: Vec<u8> = (0..200_000_u32).map(|i| (i / 7 * 31 % 251) as u8 + 1).collect();
    for size in [1, 511, 513, 4097, 65_535, 65_537, 131_071, 196_607, 199_936, 199_999] {
        std::fs::write(&odd, &content[..size]).expect("a file");
        for (cluster_size, jobs) in [("512", "1"), ("4k", "3"), ("64k", "2"), ("2M", "1")] {
            let convert = ["image", "convert", "-f", "raw", "-O", "qcow2", "-c"];
            let kind = ["--cluster-size", cluster_size, "--jobs", jobs, &odd, &path];
            nbd_cli(&[&convert[..], &kind[..]].concat()).success();
            is_clean(&qemu_img, &path);
            are_equal(&qemu_img, &path, &odd);
            let length = std::fs::metadata(&path).expect("an image").len();
            assert_eq!(length % 512, 0, "{size} bytes, clusters of {cluster_size}");
            std::fs::remove_file(&path).expect("an image");
        }
    }
    // An image that is there may be larger: what it has behind the end of the source stays.
    std::fs::write(&odd, &content[..70_001]).expect("a file");
    let larger = disk.beside("larger.img");
    std::fs::write(&larger, &content).expect("a file");
    nbd_cli(&["image", "convert", "-f", "raw", "-O", "qcow2", &larger, &path]).success();
    nbd_cli(&["image", "convert", "-f", "raw", "-O", "qcow2", "-c", "-n", &odd, &path]).success();
    is_clean(&qemu_img, &path);
    are_equal(&qemu_img, &path, &larger);
}

#[test]
fn compression_saves_space_and_holes_take_none() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let Some(allocated) = crate::support::is_sparse_here(&disk) else { return };
    let even = disk.beside("even.img");
    std::fs::write(&even, vec![7; 4 << 20]).expect("a file");
    let small = disk.beside("small.qcow2");
    nbd_cli(&["image", "convert", "-O", "qcow2", "-c", &even, &small]).success();
    assert!(allocated(&small) < 1 << 20, "{}", allocated(&small));
    is_clean(&qemu_img, &small);
    let copy = disk.beside("copy.img");
    nbd_cli(&["image", "convert", disk.path(), &copy]).success();
    disk.assert_equals(&copy);
    assert!(allocated(&copy) < 2 << 20, "{}", allocated(&copy));
}

#[test]
fn a_chain_becomes_one_image() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    for (format, name) in [("raw", "flat.img"), ("qcow2", "flat.qcow2")] {
        let flat = disk.beside(name);
        nbd_cli(&["image", "convert", "-O", format, &overlay, &flat]).success();
        are_equal(&qemu_img, &overlay, &flat);
        assert!(info(&qemu_img, &flat).get("backing-filename").is_none());
    }
    is_clean(&qemu_img, &disk.beside("flat.qcow2"));
}

#[test]
fn a_snapshot_is_copied_in_place_of_the_present() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = changed_since_snapshot(&disk, &qemu_img, &qemu_io);
    let copy = disk.beside("copy.img");
    nbd_cli(&["image", "convert", "--snapshot", "before", &image, &copy]).success();
    disk.assert_equals(&copy);
    let missing = disk.beside("missing.img");
    let outcome = nbd_cli(&["image", "convert", "--snapshot", "after", &image, &missing]);
    says(outcome, &["no snapshot 'after'", "before"]);
    assert!(!Path::new(&missing).exists());
}

#[test]
fn sizes_need_not_be_multiples_of_anything() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let odd = disk.beside("odd.img");
    std::fs::write(&odd, vec![9; (1 << 20) + 1536]).expect("a file");
    for compress in [&["--compress"][..], &[]] {
        let image = disk.beside(&format!("{}.qcow2", compress.len()));
        let mut arguments = vec!["image", "convert", "-O", "qcow2", odd.as_str(), image.as_str()];
        arguments.extend(compress);
        nbd_cli(&arguments).success();
        are_equal(&qemu_img, &odd, &image);
        is_clean(&qemu_img, &image);
    }
}

#[test]
fn progress_goes_to_standard_error_and_ends_at_all() {
    let disk = Disk::sparse();
    let copy = disk.beside("copy.qcow2");
    let outcome = nbd_cli(&["image", "convert", "-p", "-O", "qcow2", disk.path(), &copy]);
    assert!(outcome.stderr.contains("100 %  8.0 MiB of 8.0 MiB"), "{outcome:?}");
    assert_eq!(outcome.success(), "");
}

#[test]
fn a_damaged_source_leaves_no_copy() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-c", "-O", "qcow2", disk.path(), &image]);
    let mut bytes = std::fs::read(&image).expect("an image");
    let length = bytes.len();
    bytes[length / 2..].fill(0xff);
    std::fs::write(&image, &bytes).expect("room");
    for jobs in ["1", "4"] {
        let copy = disk.beside("copy.img");
        let outcome = nbd_cli(&["image", "convert", "--jobs", jobs, &image, &copy]);
        says(outcome, &[&image]);
        assert!(!Path::new(&copy).exists(), "half a copy is left");
    }
    assert!(std::fs::read(&image).expect("the image") == bytes, "the source is unchanged");
}

#[test]
fn compression_needs_a_format_that_has_it() {
    let disk = Disk::sparse();
    let copy = disk.beside("copy");
    let outcome = nbd_cli(&["image", "convert", "-c", disk.path(), &copy]);
    says(outcome, &["--compress needs", "--output-format qcow2"]);
    assert!(!Path::new(&copy).exists());
}

/// Runs a conversion under strace; returns what it opened and synced.
fn traced(strace: &Path, disk: &Disk, arguments: &[&str]) -> String {
    let log = disk.beside("strace.log");
    let trace = ["-f", "-o", &log, "-e", "trace=openat,fsync,fdatasync", PROGRAM];
    peer(strace, &[&trace[..], &["image", "convert", "--quiet"], arguments].concat());
    std::fs::read_to_string(&log).expect("a log of strace")
}

#[test]
fn caches_of_source_and_destination_are_those_that_were_asked_for() {
    tools!(qemu_img = "qemu-img", strace = "strace");
    let disk = Disk::sparse();
    let has_direct_io = has_direct_io(disk.path());
    for mode in ["writeback", "none", "writethrough", "directsync", "unsafe"] {
        let is_direct = mode == "none" || mode == "directsync";
        if is_direct && !has_direct_io {
            eprintln!("skipped: no direct I/O in the directory for temporary files");
            continue;
        }
        let (path, back) =
            (disk.beside(&format!("{mode}.qcow2")), disk.beside(&format!("{mode}.img")));
        let there = ["-t", mode, "-O", "qcow2", disk.path(), path.as_str()];
        let log = traced(&strace, &disk, &there);
        let opened = |name: &str, log: &str| {
            log.lines().any(|line| line.contains(name) && line.contains("O_DIRECT"))
        };
        assert_eq!(opened(&format!("{mode}.qcow2"), &log), is_direct, "{mode}: {log}");
        assert_eq!(log.contains("sync("), mode != "unsafe", "{mode}: {log}");
        is_clean(&qemu_img, &path);
        are_equal(&qemu_img, &path, disk.path());

        let log = traced(&strace, &disk, &["--source-cache", mode, "--cache", mode, &path, &back]);
        assert_eq!(opened(&format!("{mode}.qcow2"), &log), is_direct, "{mode}: {log}");
        disk.assert_equals(&back);
        // Into an image that is there.
        let again = ["-n", "-T", mode, "-t", mode, "-O", "qcow2", &back, &path];
        let log = traced(&strace, &disk, &again);
        assert_eq!(opened(&format!("{mode}.img"), &log), is_direct, "{mode}: {log}");
        // What is overwritten is marked as incomplete, durably.
        assert!(log.contains("sync("), "{mode}: {log}");
        is_clean(&qemu_img, &path);
        are_equal(&qemu_img, &path, disk.path());
    }
}

#[test]
fn caches_that_contradict_the_command_are_refused() {
    let disk = Disk::sparse();
    let new = disk.beside("new.img");
    let uri = "nbd://localhost:1/disk";
    let convert = |arguments: &[&str]| nbd_cli(&[&["image", "convert"], arguments].concat());
    for (arguments, why) in [
        (["--flush", "-tunsafe", disk.path(), &new], "--cache unsafe forbids that"),
        (["-q", "-tnone", disk.path(), uri], "--cache is for files"),
        (["-q", "-Tnone", uri, &new], "--source-cache is for files"),
    ] {
        says(convert(&arguments), &[why]);
        assert!(!Path::new(&new).exists());
    }
}
