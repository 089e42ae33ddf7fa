//! Protection of images: `--read-only`, locks, the guard of probed images.

use crate::support::{Disk, Server, nbd_cli, peer, run};
use crate::tools;

#[test]
fn several_servers_share_a_disk_for_reading_but_not_for_writing() {
    let disk = Disk::sparse();
    let first = Server::ours(&["--read-only", disk.path()]);
    let second = Server::ours(&["--read-only", disk.path()]);
    let copied = disk.beside("copy.img");
    nbd_cli(&["copy", second.uri(), &copied]).success();
    disk.assert_equals(&copied);
    first.end();
    second.end();
    let writer = Server::ours(&[disk.path()]);
    let socket = disk.beside("socket");
    let error = nbd_cli(&["serve", "--socket", &socket, disk.path()]).failure();
    assert!(error.contains(disk.path()) && error.contains("another program"), "{error}");
    writer.end();
}

#[test]
fn qemu_respects_our_lock() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let server = Server::ours(&[disk.path()]);
    let mut command = std::process::Command::new(&qemu_io);
    let outcome = run(command.args(["-f", "raw", "-c", "write 0 512", disk.path()]));
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("lock"), "{outcome:?}");
    server.end();
    disk.assert_equals(disk.path());
}

#[test]
fn a_guest_cannot_turn_a_probed_raw_image_into_another_format() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (image, header) = (disk.blank("raw.img", 1 << 20), disk.beside("header.qcow2"));
    peer(&qemu_img, &["create", "-f", "qcow2", &header, "1M"]);
    let guarded = Server::ours(&[&image]);
    // Before the error there is a warning that an image's container is copied.
    let outcome = nbd_cli(&["copy", &header, guarded.uri()]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("cannot write to"), "{outcome:?}");
    guarded.end();
    let free = Server::ours(&["--format", "raw", &image]);
    nbd_cli(&["copy", &header, free.uri()]).success();
    free.end();
}
