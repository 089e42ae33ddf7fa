//! `serve --snapshot`, read by qemu-img.

use crate::support::image::changed_since_snapshot;
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

#[test]
fn a_snapshot_is_served_as_it_was_and_for_reading_only() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = changed_since_snapshot(&disk, &qemu_img, &qemu_io);
    for name in ["before", "1"] {
        let server = Server::ours(&["--snapshot", name, &image]);
        peer(&qemu_img, &["compare", server.uri(), disk.path()]);
        assert_eq!(nbd_cli(&["info", "--can", "write", server.uri()]).code, Some(2));
        server.end();
    }
}

#[test]
fn a_snapshot_that_does_not_exist_is_named() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    let serve = |path: &str| nbd_cli(&["serve", "--snapshot", "none", "--run", "true", path]);
    says(serve(&image), &[&image, "no snapshot 'none'"]);
    says(serve("memory:1M"), &["memory:1M", "no snapshots"]);
    says(serve(disk.path()), &[disk.path(), "a raw image has no snapshots"]);
}
