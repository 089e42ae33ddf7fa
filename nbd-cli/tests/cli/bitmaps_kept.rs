//! Commands that change an image keep its dirty bitmaps; without them the changes would be unknown.

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::image::{are_equal, info, is_clean, write};
use crate::support::qemu_nbd::Foreground;
use crate::support::{Disk, Server, nbd_cli, peer};
use crate::tools;

/// What is dirty in each bitmap, by name, and what qemu-img says of them.
fn bitmaps(qemu_img: &Path, image: &str) -> (Value, Value) {
    let ours = nbd_cli(&["bitmap", "list", "--json", image]).success();
    let ours: Value = serde_json::from_str(&ours).expect("JSON");
    (ours, info(qemu_img, image)["format-specific"]["data"]["bitmaps"].clone())
}

#[test]
fn rebase_commit_and_amend_keep_bitmaps() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (base, other) = (directory.beside("base.qcow2"), directory.beside("other.qcow2"));
    let image = directory.beside("disk.qcow2");
    for path in [&base, &other] {
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", path, "8M"]);
        write(&qemu_io, path, "write -P 1 0 1M");
        peer(&qemu_img, &["bitmap", "--add", path, "of-base"]);
    }
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image]);
    for (name, granularity) in [("daily", "64k"), ("weekly", "512")] {
        peer(&qemu_img, &["bitmap", "--add", "-g", granularity, &image, name]);
    }
    write(&qemu_io, &image, "write -P 2 3M 64k");
    peer(&qemu_img, &["bitmap", "--disable", &image, "weekly"]);
    let before = bitmaps(&qemu_img, &image);
    let commands: [&[&str]; 6] = [
        &["rebase", "-b", &other, "-F", "qcow2"],
        &["rebase", "-u", "-b", &other, "-F", "qcow2"],
        &["rebase", "-u", "-b", &base, "-F", "qcow2"],
        &["amend", "--lazy-refcounts", "on"],
        &["amend", "--lazy-refcounts", "off", "--compat", "1.1"],
        &["commit", "--keep"],
    ];
    for command in commands {
        nbd_cli(&[&["image"], command, &["--trust-image", &image]].concat()).success();
        assert_eq!(bitmaps(&qemu_img, &image), before, "{command:?}");
        is_clean(&qemu_img, &image);
    }
    // What was committed has changed the backing file, and its bitmap says so.
    let (ours, _) = bitmaps(&qemu_img, &base);
    assert!(ours.to_string().contains("65536"), "{ours}");
}

/// The dirty parts of a bitmap, as qemu-nbd and nbdinfo tell them.
fn dirty_parts(tools: [&Path; 2], image: &str, bitmap: &str) -> String {
    let [qemu_nbd, nbdinfo] = tools;
    let arguments = ["-t", "-r", "-f", "qcow2", "-B", bitmap, image];
    let server = Foreground::start(Command::new(qemu_nbd), &arguments);
    peer(nbdinfo, &[&format!("--map=qemu:dirty-bitmap:{bitmap}"), &server.uri("")])
}

#[test]
fn a_commit_makes_dirty_what_it_copies_into_the_base_and_nothing_in_the_overlay() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd", nbdinfo = "nbdinfo");
    let mut seen = Vec::new();
    for program in ["theirs", "ours", "ours, keeping the overlay"] {
        let directory = Disk::sparse();
        let (base, image) = (directory.beside("base.qcow2"), directory.beside("disk.qcow2"));
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", &base, "8M"]);
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image]);
        write(&qemu_io, &image, "write -P 2 5M 64k");
        for path in [&base, &image] {
            peer(&qemu_img, &["bitmap", "--add", path, "daily"]);
            peer(&qemu_img, &["bitmap", "--add", "-g", "512", path, "weekly"]);
        }
        write(&qemu_io, &image, "write -P 3 3M 64k");
        write(&qemu_io, &image, "write -z 6M 64k");
        peer(&qemu_img, &["bitmap", "--disable", &image, "weekly"]);
        let disk = directory.beside("before.img");
        peer(&qemu_img, &["convert", "-O", "raw", &image, &disk]);
        match program {
            "theirs" => drop(peer(&qemu_img, &["commit", "-q", &image])),
            "ours" => drop(nbd_cli(&["image", "commit", &image]).success()),
            _ => drop(nbd_cli(&["image", "commit", "--keep", &image]).success()),
        }
        are_equal(&qemu_img, &image, &disk);
        are_equal(&qemu_img, &base, &disk);
        is_clean(&qemu_img, &image);
        let bitmaps = [(&base, "daily"), (&base, "weekly"), (&image, "daily"), (&image, "weekly")];
        seen.push(bitmaps.map(|(path, name)| dirty_parts([&qemu_nbd, &nbdinfo], path, name)));
    }
    assert!(seen[0].iter().all(|parts| parts.contains("dirty") && parts.contains("clean")));
    assert_eq!(seen[1], seen[0]);
    assert_eq!(seen[2], seen[0]);
}

#[test]
fn a_backing_file_that_is_renamed_after_a_crash_costs_no_dirty_bits() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (base, moved) = (directory.beside("base.qcow2"), directory.beside("moved.qcow2"));
    let image = directory.beside("disk.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &base, "8M"]);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image]);
    peer(&qemu_img, &["bitmap", "--add", &image, "daily"]);
    let mut server = Server::ours(&["--format", "qcow2", "--trust-image", &image]);
    peer(&qemu_io, &["-f", "raw", "-c", "write -P 7 1M 64k", "-c", "flush", server.uri()]);
    server.signal(Signal::KILL);
    server.wait();
    std::fs::rename(&base, &moved).expect("a new name");
    nbd_cli(&["image", "rebase", "-u", "-b", "moved.qcow2", "-F", "qcow2", &image]).success();
    let (ours, theirs) = bitmaps(&qemu_img, &image);
    assert!(!theirs.to_string().contains("in-use"), "{theirs}");
    assert!(ours.to_string().contains("65536"), "{ours}");
    is_clean(&qemu_img, &image);
}
