//! `copy` between all kinds of servers and files.

use crate::support::{Disk, Server, nbd_cli, peer};
use crate::tools;

#[track_caller]
fn copy(arguments: &[&str]) {
    nbd_cli(&[&["copy"], arguments].concat()).success();
}

#[test]
fn from_and_to_qemu_nbd() {
    tools!(qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let blank = disk.blank("blank.img", 8 << 20);
    let from = Server::qemu_nbd(&qemu_nbd, "from", &["-f", "raw", "-r", disk.path()]);
    let to = Server::qemu_nbd(&qemu_nbd, "to", &["-f", "raw", &blank]);
    copy(&["--flush", from.uri(), to.uri()]);
    disk.assert_equals(&blank);
    let copied = disk.beside("copy.img");
    copy(&[to.uri(), &copied]);
    disk.assert_equals(&copied);
}

#[test]
fn from_and_to_nbdkit_in_every_protocol() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    for options in
        [&[][..], &["--no-sr"], &["-o"], &["--mask-handshake=0"], &["--mask-handshake=1"]]
    {
        let server = Server::nbdkit(&nbdkit, &[options, &["memory", "8M"]].concat());
        let copied = disk.beside("copy.img");
        copy(&[disk.path(), server.uri()]);
        copy(&[server.uri(), &copied]);
        disk.assert_equals(&copied);
    }
}

#[test]
fn from_and_to_nbd_server() {
    tools!(nbd_server = "nbd-server");
    let disk = Disk::sparse();
    let blank = disk.blank("blank.img", 8 << 20);
    let server = Server::nbd_server(&nbd_server, "disk", &blank);
    let copied = disk.beside("copy.img");
    copy(&[disk.path(), server.uri()]);
    copy(&[server.uri(), &copied]);
    disk.assert_equals(&copied);
}

#[test]
fn from_and_to_our_own_server_over_tcp_and_several_connections() {
    let disk = Disk::sparse();
    let blank = disk.blank("blank.img", 8 << 20);
    let server = Server::ours(&["--listen=127.0.0.1:0", &blank]);
    copy(&["-C", "3", "-R", "7", "--request-size", "64K", disk.path(), server.uri()]);
    disk.assert_equals(&blank);
    let copied = disk.beside("copy.img");
    copy(&["-C", "1", "-R", "1", server.uri(), &copied]);
    disk.assert_equals(&copied);
    server.end();
}

#[test]
fn qemu_img_finds_our_copy_identical() {
    tools!(qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let image = disk.beside("disk.qcow2");
    peer(&qemu_img, &["create", "-f", "qcow2", &image, "8M"]);
    let server = Server::qemu_nbd(&qemu_nbd, "x", &["-f", "qcow2", &image]);
    copy(&["--flush", disk.path(), server.uri()]);
    peer(&qemu_img, &["compare", "-f", "raw", "-F", "raw", disk.path(), server.uri()]);
}

#[test]
fn from_file_to_file() {
    let disk = Disk::sparse();
    let copied = disk.beside("copy.img");
    // What was there before is gone, also what was longer.
    std::fs::write(&copied, vec![7; 9 << 20]).expect("room");
    copy(&["--flush", disk.path(), &copied]);
    disk.assert_equals(&copied);
}

#[test]
fn a_file_is_not_copied_onto_itself() {
    let disk = Disk::sparse();
    let error = nbd_cli(&["copy", disk.path(), disk.path()]).failure();
    assert!(error.contains("the source and the destination"), "{error}");
    disk.assert_equals(disk.path());
}

#[test]
fn odd_sizes_are_copied_to_the_last_byte() {
    let disk = Disk::sparse();
    let (odd, copied) = (disk.beside("odd.img"), disk.beside("copy.img"));
    for size in [0, 1, 511, 4097, 1_000_001] {
        std::fs::write(&odd, &disk.content()[..size]).expect("room");
        let server = Server::ours(&["--read-only", &odd]);
        copy(&[server.uri(), &copied]);
        assert!(std::fs::read(&copied).expect("the copy") == disk.content()[..size], "{size}");
    }
}

#[test]
fn a_destination_that_is_too_small_or_read_only_is_refused() {
    let disk = Disk::sparse();
    let small = Server::ours(&["memory:1M"]);
    let error = nbd_cli(&["copy", disk.path(), small.uri()]).failure();
    assert!(error.contains("has 1048576 bytes and the source 8388608"), "{error}");
    let blank = disk.blank("blank.img", 8 << 20);
    let read_only = Server::ours(&["--read-only", &blank]);
    let error = nbd_cli(&["copy", disk.path(), read_only.uri()]).failure();
    assert!(error.contains("read-only"), "{error}");
}

#[test]
fn a_larger_destination_keeps_what_lies_behind() {
    let disk = Disk::sparse();
    let large = disk.beside("large.img");
    std::fs::write(&large, vec![7; 9 << 20]).expect("room");
    let server = Server::ours(&[&large]);
    copy(&[disk.path(), server.uri()]);
    server.end();
    let found = std::fs::read(&large).expect("the disk");
    assert!(found[..8 << 20] == *disk.content(), "the copy");
    assert!(found[8 << 20..].iter().all(|&byte| byte == 7), "what lies behind it");
}
