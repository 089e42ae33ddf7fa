//! A server is killed during a checkpoint, and no other one is started: the frozen bits are merged
//! back into their bitmap, or the bitmap is refused.

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::image::is_clean;
use crate::support::qemu_nbd::{self, Foreground};
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

const CONTEXT: &str = "--map=qemu:dirty-bitmap:daily";

/// An image as a cut-off checkpoint leaves it: 1M is dirty in the bits that were set aside, 5M in
/// the bitmap itself.
fn left_over(disk: &Disk, qemu_img: &Path, qemu_io: &Path) -> String {
    let image = disk.beside("disk.qcow2");
    let bitmap = |arguments: &[&str]| {
        peer(qemu_img, &[&["bitmap"], arguments].concat());
    };
    let write = |place: &str| {
        peer(qemu_io, &["-f", "qcow2", "-c", &format!("write -P 7 {place} 64k"), &image]);
    };
    peer(qemu_img, &["create", "-q", "-f", "qcow2", &image, "64M"]);
    bitmap(&["--add", &image, "daily.checkpoint"]);
    write("1M");
    bitmap(&["--disable", &image, "daily.checkpoint"]);
    bitmap(&["--add", &image, "daily"]);
    write("5M");
    image
}

/// An image whose server is killed during a checkpoint: 1M is written before it, `later` after its
/// begin.
fn cut_off(
    disk: &Disk,
    (qemu_img, qemu_io): (&Path, &Path),
    checkpoint: &[&str],
    later: &[&str],
) -> String {
    let (image, control) = (disk.beside("disk.qcow2"), disk.beside("control"));
    peer(qemu_img, &["create", "-q", "-f", "qcow2", &image, "64M"]);
    peer(qemu_img, &["bitmap", "--add", &image, "daily"]);
    let mut server = Server::ours(&["--control", &control, &image]);
    let write = |place: &str| {
        peer(qemu_io, &["-f", "raw", "-c", &format!("write -P 7 {place} 64k"), server.uri()]);
    };
    write("1M");
    let start = ["control", &control, "checkpoint-start", "", "-B", "daily"];
    nbd_cli(&[&start, checkpoint].concat()).success();
    later.iter().for_each(|place| write(place));
    server.signal(Signal::KILL);
    server.wait();
    image
}

/// Marks a bitmap as in use.
fn mark_in_use(image: &str, name: &str) {
    let mut bytes = std::fs::read(image).expect("the image");
    let name = name.as_bytes();
    let places: Vec<usize> = (24..bytes.len() - name.len())
        .filter(|at| {
            bytes[*at..].starts_with(name) && bytes[at - 6..at - 4] == [0, name.len() as u8]
        })
        .collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at - 9] |= 1;
    }
    std::fs::write(image, bytes).expect("the image");
}

fn dirty_places(nbdinfo: &Path, uri: &str) -> Vec<String> {
    let map = peer(nbdinfo, &[CONTEXT, uri]);
    let dirty = map.lines().filter(|line| line.trim_end().ends_with("dirty"));
    dirty.filter_map(|line| line.split_whitespace().next()).map(ToOwned::to_owned).collect()
}

#[test]
fn the_bits_of_a_checkpoint_that_was_cut_off_are_served_again() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", nbdinfo = "nbdinfo");
    let directory = Disk::sparse();
    let disk = cut_off(&directory, (&qemu_img, &qemu_io), &["--view", "view"], &["5M"]);

    let server = Server::ours(&["--bitmap", "daily", &disk]);
    assert_eq!(dirty_places(&nbdinfo, server.uri()), ["1048576", "5242880"]);
    server.end();
    is_clean(&qemu_img, &disk);
    let info = peer(&qemu_img, &["info", &disk]);
    assert!(!info.contains("daily.checkpoint") && !info.contains("in-use"), "{info}");
}

#[test]
fn qemu_serves_all_bits_of_a_server_killed_right_after_a_checkpoint_began() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd", nbdinfo = "nbdinfo");
    let directory = Disk::sparse();
    let disk = cut_off(&directory, (&qemu_img, &qemu_io), &[], &[]);

    let serve = ["-r", "-t", "-f", "qcow2", "-B", "daily", &disk];
    let judge = Foreground::start(Command::new(qemu_nbd), &serve);
    assert_eq!(dirty_places(&nbdinfo, &judge.uri("")), ["1048576"]);
    drop(judge);
    assert_eq!(change(&["recover", &disk]), [("daily".to_owned(), Some(64 << 10))]);
    is_clean(&qemu_img, &disk);
}

#[test]
fn qemu_refuses_a_bitmap_that_lacks_the_writes_since_a_checkpoint_that_was_cut_off() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let disk = cut_off(&directory, (&qemu_img, &qemu_io), &[], &["5M"]);
    let info = peer(&qemu_img, &["info", "--output=json", &disk]);
    let info: Value = serde_json::from_str(&info).expect("JSON");
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().expect("bitmaps");
    let daily = bitmaps.iter().find(|it| it["name"] == "daily").expect("the bitmap");
    assert!(daily["flags"].as_array().expect("flags").contains(&"in-use".into()), "{daily}");
    assert_eq!(change(&["recover", &disk]), [("daily".to_owned(), Some(128 << 10))]);
    is_clean(&qemu_img, &disk);
}

#[test]
fn every_reader_of_bitmaps_knows_that_a_killed_checkpoint_left_them_incomplete() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let disk = cut_off(&directory, (&qemu_img, &qemu_io), &[], &["5M"]);

    let list = nbd_cli(&["bitmap", "list", &disk]).success();
    assert!(list.contains("daily  incomplete: a checkpoint has moved bits of it"), "{list}");
    let list = nbd_cli(&["bitmap", "list", "--json", &disk]).success();
    let list: Value = serde_json::from_str(&list).expect("JSON");
    let daily = list["bitmaps"].as_array().expect("a list").iter().find(|it| it["name"] == "daily");
    let daily = daily.expect("the bitmap");
    assert_eq!(daily["state"], "incomplete", "{list}");
    assert_eq!(daily["dirty-bytes"], Value::Null, "{list}");
    let other = directory.beside("other.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &other, "64M"]);
    nbd_cli(&["bitmap", "add", &other, "weekly"]).success();
    let merge = ["bitmap", "merge", "--from", &disk, &other, "weekly", "daily"];
    says(nbd_cli(&merge), &["'daily'", "bitmap recover"]);
    let serve = ["serve", "--read-only", "--run", "true", "--bitmap", "daily", &disk];
    says(nbd_cli(&serve), &["'daily'", "bitmap recover"]);
    let arguments = ["-r", "-f", "qcow2", "-B", "daily", "-k", &directory.beside("socket"), &disk];
    let said = nbd_cli(&[&["qemu-nbd"][..], &arguments].concat());
    assert_eq!(said.code, Some(1), "{said:?}");

    // Whatever opens it for writing puts the bits back.
    nbd_cli(&["image", "resize", &disk, "+1M"]).success();
    let all = change(&["recover", &disk]);
    assert_eq!(all, [("daily".to_owned(), Some(128 << 10))]);
    is_clean(&qemu_img, &disk);
}

#[test]
fn a_full_backup_that_is_cut_off_leaves_no_bitmap_that_looks_as_if_little_had_changed() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "64M"]);
    let mut server = Server::ours(&["--control", &control, &disk]);
    let start = ["control", &control, "checkpoint-start", "", "-B", "daily", "--add-bitmap"];
    nbd_cli(&start).success();
    peer(&qemu_io, &["-f", "raw", "-c", "write -P 7 1M 64k", server.uri()]);
    server.signal(Signal::KILL);
    server.wait();
    // It notes changes since a backup that nobody has.
    assert_eq!(change(&["recover", &disk]), [("daily".to_owned(), Some(64 << 20))]);
    is_clean(&qemu_img, &disk);
}

#[test]
fn the_form_of_qemu_nbd_serves_them_too() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", nbdinfo = "nbdinfo");
    let disk = Disk::sparse();
    let image = left_over(&disk, &qemu_img, &qemu_io);
    let server = Foreground::start(qemu_nbd::ours(), &["-f", "qcow2", "-B", "daily", &image]);
    assert_eq!(dirty_places(&nbdinfo, &server.uri("")), ["1048576", "5242880"]);
    assert!(server.complaints().contains("a checkpoint was interrupted"));
}

#[test]
fn who_only_reads_is_told_how_to_put_them_back() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", nbdinfo = "nbdinfo");
    let disk = Disk::sparse();
    let image = left_over(&disk, &qemu_img, &qemu_io);
    let overlay = disk.beside("overlay.qcow2");
    let over = ["create", "-q", "-f", "qcow2", "-b", &image, "-F", "qcow2", &overlay];
    peer(&qemu_img, &over);
    let socket = disk.beside("socket");
    let serve = |arguments: &[&str]| {
        nbd_cli(&[&["serve", "--socket", &socket, "--run", "true"], arguments].concat())
    };
    for more in [&["--read-only", &image][..], &["--temporary", &image], &[&overlay]] {
        let reason = ["'daily'", "'daily.checkpoint'", "nbd-cli bitmap recover"];
        says(serve(&[&["--bitmap", "daily"], more].concat()), &reason);
    }
    let listed = ["--bitmap", "all", "--read-only", "--run", "nbdinfo \"$uri\"", &image];
    let outcome = nbd_cli(&[&["serve", "--socket", &socket], &listed[..]].concat());
    assert!(outcome.stderr.contains("not offered: the bitmap 'daily' lacks"), "{outcome:?}");
    assert!(!outcome.stdout.contains("qemu:dirty-bitmap:daily\n"), "{outcome:?}");
    let other = disk.beside("other.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &other, "64M"]);
    nbd_cli(&["bitmap", "add", &other, "weekly"]).success();
    let merge = ["bitmap", "merge", "--from", &image, &other, "weekly", "daily"];
    says(nbd_cli(&merge), &["bitmap recover"]);

    nbd_cli(&["bitmap", "recover", &image]).success();
    let server = Server::ours(&["--read-only", "--bitmap", "daily", &image]);
    assert_eq!(dirty_places(&nbdinfo, server.uri()), ["1048576", "5242880"]);
    server.end();
    is_clean(&qemu_img, &image);
}

/// What `nbd-cli bitmap` says in the end: names, and how much is dirty in them.
fn change(arguments: &[&str]) -> Vec<(String, Option<u64>)> {
    let said = nbd_cli(&[&["bitmap"], arguments, &["--json"]].concat()).success();
    let report: Value = serde_json::from_str(&said).expect("JSON");
    let named = |bitmap: &Value| {
        (bitmap["name"].as_str().expect("a name").to_owned(), bitmap["dirty-bytes"].as_u64())
    };
    report["bitmaps"].as_array().expect("bitmaps").iter().map(named).collect()
}

#[test]
fn a_command_that_changes_bitmaps_puts_them_back_first() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = left_over(&disk, &qemu_img, &qemu_io);
    change(&["add", &image, "weekly"]);
    let all = change(&["merge", &image, "weekly", "daily"]);
    let dirty = |name: &str| (name.to_owned(), Some(128 << 10));
    assert_eq!(all, [dirty("daily"), dirty("weekly")]);
    is_clean(&qemu_img, &image);
}

#[test]
fn a_bitmap_of_another_kind_with_that_name_is_left_alone() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("disk.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "64M"]);
    for (name, more) in [
        ("enabled", &["--enable"][..]),
        ("enabled.checkpoint", &["--enable"]),
        ("coarse", &["--enable"]),
        ("coarse.checkpoint", &["--disable", "-g", "1M"]),
        ("alone.checkpoint", &["--disable"]),
    ] {
        peer(&qemu_img, &[&["bitmap", "--add"], more, &[&image, name]].concat());
    }
    assert_eq!(change(&["recover", &image]).len(), 5);
    let serve = ["serve", "--bitmap", "enabled", "--bitmap", "coarse", "--run", "true", &image];
    assert_eq!(nbd_cli(&serve).stderr, "");
}

#[test]
fn bits_that_cannot_be_relied_on_make_their_bitmap_unreliable() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = left_over(&disk, &qemu_img, &qemu_io);
    mark_in_use(&image, "daily.checkpoint");
    let serve = |more: &[&str]| nbd_cli(&[&["serve", "--run", "true", &image], more].concat());
    // The disk can be served, the bitmap cannot.
    serve(&[]).success();
    for more in [&[][..], &["--read-only"]] {
        let outcome = serve(&[&["--bitmap", "daily"], more].concat());
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        let last = outcome.stderr.lines().last().unwrap_or_default();
        assert!(last.contains("bitmap repair IMAGE daily.checkpoint"), "{outcome:?}");
    }
    let bitmap = |arguments: &[&str]| nbd_cli(&[&["bitmap"], arguments].concat());
    for refused in [&["remove", &image, "daily.checkpoint"][..], &["recover", &image]] {
        let outcome = bitmap(refused);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(outcome.stderr.contains("bitmap repair"), "{outcome:?}");
    }
    let all = change(&["repair", &image, "daily.checkpoint"]);
    assert_eq!(all, [("daily".to_owned(), Some(64 << 20))], "everything may have changed");
    serve(&["--bitmap", "daily"]).success();
    is_clean(&qemu_img, &image);
}
