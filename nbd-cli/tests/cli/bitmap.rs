//! `nbd-cli bitmap` and `serve --bitmap`, judged by qemu-img, qemu-nbd's map and nbdinfo.

use std::path::Path;

use crate::support::image::{info, is_clean};
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

/// The dirty parts of a served bitmap as nbdinfo sees them: offset and length.
fn dirty(nbdinfo: &Path, uri: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let map = peer(nbdinfo, &[&*format!("--map=qemu:dirty-bitmap:{bitmap}"), uri]);
    let numbers = map.lines().map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |index: usize| words[index].parse::<u64>().expect("a number");
        (number(0), number(1), number(2))
    });
    let dirty = numbers.filter(|(_, _, flags)| *flags == 1);
    dirty.map(|(offset, length, _)| (offset, length)).collect()
}

fn json(arguments: &[&str]) -> serde_json::Value {
    let all: Vec<_> = ["bitmap"].iter().chain(arguments).chain(&["--json"]).copied().collect();
    nbd_cli(&all).json()
}

#[test]
fn bitmaps_are_added_merged_and_removed_as_qemu_img_sees_it() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = disk.beside("disk.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "8M"]);
    assert_eq!(nbd_cli(&["bitmap", "add", &image, "fine", "--granularity", "512"]).success(), "");
    nbd_cli(&["bitmap", "add", &image, "sum", "--disabled"]).success();
    peer(&qemu_io, &["-f", "qcow2", "-c", "write 1M 512", &image]);
    let found = info(&qemu_img, &image);
    let bitmaps = &found["format-specific"]["data"]["bitmaps"];
    assert_eq!(bitmaps[0]["granularity"], 512);
    assert_eq!(bitmaps[1]["granularity"], 65536);
    nbd_cli(&["bitmap", "merge", &image, "sum", "fine"]).success();
    let report = json(&["clear", &image, "fine"]);
    assert_eq!(report["bitmaps"][0]["dirty-bytes"], 0);
    assert_eq!(report["bitmaps"][1]["dirty-bytes"], 65536);
    assert_eq!(report["bitmaps"][1]["state"], "consistent");
    let copy = disk.beside("copy.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &copy, "8M"]);
    nbd_cli(&["bitmap", "add", &copy, "mine"]).success();
    nbd_cli(&["bitmap", "merge", &copy, "mine", "sum", "--from", &image]).success();
    assert_eq!(json(&["list", &copy])["bitmaps"][0]["dirty-bytes"], 65536);
    let list = nbd_cli(&["bitmap", "list", &image]).success();
    assert!(list.contains("disabled  sum  64"), "{list}");
    says(nbd_cli(&["bitmap", "add", &image, "sum"]), &[&image, "'sum' already"]);
    says(nbd_cli(&["bitmap", "add", &image, "x", "-g", "1000"]), &["power of two"]);
    says(nbd_cli(&["bitmap", "add", &image, &"x".repeat(1024)]), &["1 to 1023 bytes"]);
    says(nbd_cli(&["bitmap", "remove", &image, "none"]), &["no bitmap 'none'"]);
    says(nbd_cli(&["bitmap", "repair", &image, "sum"]), &["is sound"]);
    for name in ["fine", "sum"] {
        nbd_cli(&["bitmap", "remove", &image, name]).success();
        is_clean(&qemu_img, &image);
    }
    assert!(info(&qemu_img, &image)["format-specific"]["data"].get("bitmaps").is_none());
}

#[test]
fn a_served_bitmap_shows_what_is_written_while_it_is_served() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", nbdinfo = "nbdinfo");
    let disk = Disk::sparse();
    let image = disk.beside("disk.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "8M"]);
    nbd_cli(&["bitmap", "add", &image, "day"]).success();
    let server = Server::ours(&["--bitmap", "all", &image]);
    let offered = nbd_cli(&["list-meta", server.uri()]).success();
    assert!(offered.contains("qemu:dirty-bitmap:day"), "{offered}");
    assert_eq!(dirty(&nbdinfo, server.uri(), "day"), []);
    peer(&qemu_io, &["-f", "raw", "-c", "write 1M 1", "-c", "write -z 3M 64k", server.uri()]);
    let expected = [(1 << 20, 65536), (3 << 20, 65536)];
    assert_eq!(dirty(&nbdinfo, server.uri(), "day"), expected);
    server.end();
    is_clean(&qemu_img, &image);
    // Also of a backing file, and read-only.
    let overlay = disk.beside("overlay.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &image, "-F", "qcow2", &overlay]);
    let server = Server::ours(&["--read-only", "--bitmap", "day", &overlay]);
    assert_eq!(dirty(&nbdinfo, server.uri(), "day"), expected);
    server.end();
    says(nbd_cli(&["serve", "--bitmap", "night", &image]), &["no bitmap 'night'"]);
    let raw = Disk::sparse();
    says(nbd_cli(&["serve", "--bitmap", "night", raw.path()]), &["a raw image has no bitmaps"]);
}
