//! `image convert` from and to servers, and of images with layers on servers.

use crate::support::image::{are_equal, info, is_clean};
use crate::support::{Disk, Server, is_sparse_here, nbd_cli, peer, says};
use crate::tools;

#[test]
fn an_export_becomes_an_image_and_an_image_an_export() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    let server = Server::ours(&["--read-only", disk.path()]);
    nbd_cli(&["image", "convert", "-O", "qcow2", server.uri(), &image]).success();
    server.end();
    is_clean(&qemu_img, &image);
    are_equal(&qemu_img, &image, disk.path());
    let copy = disk.blank("copy.img", 8 << 20);
    let server = Server::ours(&[&copy]);
    nbd_cli(&["image", "convert", "--flush", &image, server.uri()]).success();
    server.end();
    disk.assert_equals(&copy);
}

#[test]
fn holes_cross_the_network_as_holes() {
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let full = disk.beside("full.img");
    std::fs::write(&full, vec![7; 8 << 20]).expect("room");
    let (from, to) = (Server::ours(&["--read-only", disk.path()]), Server::ours(&[&full]));
    nbd_cli(&["image", "convert", from.uri(), to.uri()]).success();
    to.end();
    disk.assert_equals(&full);
    assert!(allocated(&full) <= 2 << 20, "{}", allocated(&full));
}

#[test]
fn a_qcow2_image_inside_an_export_is_read_and_written() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    // An export is as long as it is: what the image will need has to be there.
    let inside = disk.blank("inside.qcow2", 0);
    std::fs::remove_file(&inside).expect("it is there");
    let create = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", &inside, "8M"];
    peer(&qemu_img, &create);
    let server = Server::ours(&["--format", "raw", &inside]);
    nbd_cli(&["image", "convert", "-O", "qcow2", disk.path(), server.uri()]).success();
    let copy = disk.beside("copy.img");
    nbd_cli(&["image", "convert", "--format", "qcow2", server.uri(), &copy]).success();
    server.end();
    disk.assert_equals(&copy);
    is_clean(&qemu_img, &inside);
}

#[test]
fn a_backing_file_on_a_server_is_read_if_the_image_is_trusted() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let server = Server::ours(&["--read-only", disk.path()]);
    let (overlay, copy) = (disk.beside("overlay.qcow2"), disk.beside("copy.img"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", server.uri(), "-F", "raw", &overlay]);
    assert_eq!(info(&qemu_img, &overlay)["backing-filename"], server.uri());
    says(nbd_cli(&["image", "convert", &overlay, &copy]), &["nbd+unix", "--trust-image"]);
    nbd_cli(&["image", "convert", "--trust-image", &overlay, &copy]).success();
    disk.assert_equals(&copy);
}

#[test]
fn what_a_server_cannot_take_is_said_beforehand() {
    let disk = Disk::sparse();
    let small = disk.blank("small.img", 1 << 20);
    let server = Server::ours(&[&small]);
    says(nbd_cli(&["image", "convert", disk.path(), server.uri()]), &["does not fit", "1048576"]);
    server.end();
    let server = Server::ours(&["--read-only", disk.path()]);
    says(nbd_cli(&["image", "convert", &small, server.uri()]), &["read-only", "nbd+unix"]);
    says(nbd_cli(&["image", "convert", "-", &small]), &["'-' is not an image", "NBD URI"]);
    let gone = server.uri().to_owned();
    server.end();
    says(nbd_cli(&["image", "convert", &gone, &disk.beside("copy.img")]), &["nbd+unix"]);
}
