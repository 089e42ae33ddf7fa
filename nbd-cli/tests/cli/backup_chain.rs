//! Backups of a disk that qemu-nbd serves with a dirty bitmap, and their restoration.

use std::path::Path;

use serde_json::Value;

use crate::support::image::{are_equal, info, is_clean, write};
use crate::support::{Disk, Server, nbd_cli, peer};
use crate::tools;

/// A qcow2 disk with data, a bitmap `b0`, and nothing dirty.
pub(crate) fn disk_with_bitmap(directory: &Disk, qemu_img: &Path, qemu_io: &Path) -> String {
    let disk = directory.beside("disk.qcow2");
    peer(qemu_img, &["create", "-q", "-f", "qcow2", &disk, "64M"]);
    write(qemu_io, &disk, "write -P 1 0 5M");
    write(qemu_io, &disk, "write -P 2 20M 100k");
    write(qemu_io, &disk, "write -z 30M 1M");
    peer(qemu_img, &["bitmap", "--add", "--enable", &disk, "b0"]);
    disk
}

pub(crate) fn serve(qemu_nbd: &Path, disk: &str) -> Server {
    Server::qemu_nbd(qemu_nbd, "disk", &["-r", "-B", "b0", "-f", "qcow2", disk])
}

/// Writes over data, zeroes over data and data over nothing.
pub(crate) fn change(qemu_io: &Path, disk: &str) {
    write(qemu_io, disk, "write -P 3 1M 200k");
    write(qemu_io, disk, "write -z -u 3M 256k");
    write(qemu_io, disk, "write -P 4 50M 4k");
}

#[test]
fn a_chain_of_backups_restores_to_the_same_disk() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let (full, second) = (directory.beside("full.qcow2"), directory.beside("second.qcow2"));

    let server = serve(&qemu_nbd, &disk);
    let said = nbd_cli(&["backup", "--verify", "--json", server.uri(), &full]).success();
    let report: Value = serde_json::from_str(&said).expect("JSON");
    assert!(report["copied"].as_u64() < Some(8 << 20), "{report}");
    assert_eq!(report["size"], 64 << 20, "{report}");
    server.end();
    is_clean(&qemu_img, &full);
    are_equal(&qemu_img, &disk, &full);
    assert!(!Path::new(&directory.beside("full.qcow2.partial.json")).exists());

    change(&qemu_io, &disk);
    let server = serve(&qemu_nbd, &disk);
    let arguments = ["backup", "--bitmap", "b0", "--base", &full, "--verify=all", "--json"];
    let said = nbd_cli(&[&arguments[..], &[server.uri(), &second]].concat()).success();
    server.end();
    let report: Value = serde_json::from_str(&said).expect("JSON");
    let moved = |what: &str| report[what].as_u64().expect("a number");
    assert!(moved("copied") <= 512 << 10, "only what is dirty is copied: {report}");
    assert_eq!(moved("zero"), 256 << 10, "{report}");
    assert_eq!(moved("verified"), 64 << 20, "{report}");
    is_clean(&qemu_img, &second);
    are_equal(&qemu_img, &disk, &second);
    let about = info(&qemu_img, &second);
    assert_eq!(about["backing-filename"], "full.qcow2", "{about}");
    assert_eq!(about["backing-filename-format"], "qcow2", "{about}");

    let (raw, qcow2) = (directory.beside("restored.img"), directory.beside("restored.qcow2"));
    nbd_cli(&["restore", "--verify", &second, &raw]).success();
    are_equal(&qemu_img, &disk, &raw);
    nbd_cli(&["restore", "--verify", "--output-format", "qcow2", &second, &qcow2]).success();
    is_clean(&qemu_img, &qcow2);
    are_equal(&qemu_img, &disk, &qcow2);
    let blank = directory.beside("blank.img");
    std::fs::write(&blank, vec![7; 64 << 20]).expect("room");
    let server = Server::ours(&["--format", "raw", &blank]);
    nbd_cli(&["restore", "--verify", &second, server.uri()]).success();
    server.end();
    are_equal(&qemu_img, &disk, &blank);
}

#[test]
fn verification_finds_a_base_that_does_not_belong_to_the_bitmap() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    // Of the right size, but with other content where nothing is dirty.
    let wrong = directory.beside("wrong.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &wrong, "64M"]);
    change(&qemu_io, &disk);
    let server = serve(&qemu_nbd, &disk);
    let target = directory.beside("second.qcow2");
    let arguments = ["--bitmap", "b0", "--base", &wrong, server.uri(), &target];
    let outcome = nbd_cli(&[&["backup", "--verify=all", "--trust-base"][..], &arguments].concat());
    crate::support::says(outcome, &["differs from the source", "--restart"]);
    assert!(!Path::new(&target).exists(), "what is wrong gets no name");
}

/// The last cluster is incomplete, and the last sector of the disk changes between the backups.
#[test]
fn a_disk_that_ends_within_a_cluster_is_backed_up_twice_and_restored_where_it_came_from() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    for size in [512, 64 * 1024 - 512, 64 * 1024 + 512, 1_000_448] {
        let name = |what: &str| directory.beside(&format!("{size}-{what}"));
        let (disk, control) = (name("disk.qcow2"), name("control"));
        let size_text = size.to_string();
        nbd_cli(&["image", "create", "-f", "qcow2", &disk, &size_text]).success();
        let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
        let backup = |more: &[&str]| {
            let arguments = ["backup", "--verify=all", "--control", &control, "--export", "vm"];
            nbd_cli(&[&arguments[..], &["-B", "daily"], more].concat()).success();
        };
        let (first, last) = (name("first.img"), name("last.img"));
        let mut content = vec![7; size];
        std::fs::write(&first, &content).expect("room");
        content[size - 1] = 8;
        std::fs::write(&last, &content).expect("room");

        let (full, second) = (name("full.qcow2"), name("second.qcow2"));
        nbd_cli(&["copy", &first, server.uri()]).success();
        backup(&[&full]);
        nbd_cli(&["copy", &last, server.uri()]).success();
        backup(&["--base", &full, &second]);

        for (backup, expected) in [(&full, &first), (&second, &last)] {
            is_clean(&qemu_img, backup);
            let (restored, copied) = (name("restored.img"), name("copied.img"));
            nbd_cli(&["restore", "--verify", backup, &restored]).success();
            nbd_cli(&["restore", "--verify", backup, server.uri()]).success();
            nbd_cli(&["copy", server.uri(), &copied]).success();
            for file in [restored, copied] {
                assert!(
                    std::fs::read(&file).expect("it") == std::fs::read(expected).expect("it"),
                    "{file} of {size} bytes"
                );
                std::fs::remove_file(file).expect("it is there");
            }
        }
        server.end();
        is_clean(&qemu_img, &disk);
    }
}
