//! Backups and restores that cannot be right are refused, and nothing is left behind.

use std::path::Path;

use crate::backup_chain::{disk_with_bitmap, serve};
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

#[test]
fn a_bitmap_that_is_not_offered_is_named_with_those_that_are() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let folder = Disk::sparse();
    let disk = disk_with_bitmap(&folder, &qemu_img, &qemu_io);
    let base = folder.beside("base.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &base, "64M"]);
    let target = folder.beside("target.qcow2");
    let server = serve(&qemu_nbd, &disk);
    let arguments = ["backup", "--bitmap", "b1", "--base", &base, server.uri(), &target];
    says(nbd_cli(&arguments), &["no dirty bitmap 'b1'", "'b0'"]);
    assert!(!Path::new(&folder.beside("target.qcow2.partial")).exists());
}

#[test]
fn a_base_of_another_size_is_refused() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let folder = Disk::sparse();
    let disk = disk_with_bitmap(&folder, &qemu_img, &qemu_io);
    let base = folder.beside("base.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &base, "32M"]);
    let target = folder.beside("target.qcow2");
    let server = serve(&qemu_nbd, &disk);
    let arguments = ["backup", "--bitmap", "b0", "--base", &base, server.uri(), &target];
    says(nbd_cli(&arguments), &["67108864", "33554432", "full backup"]);
    assert!(!Path::new(&target).exists());
}

#[test]
fn files_that_exist_are_left_alone() {
    let folder = Disk::sparse();
    let server = Server::ours(&["--read-only", folder.path()]);
    says(nbd_cli(&["backup", server.uri(), folder.path()]), &["exists already"]);
    let image = folder.beside("image.qcow2");
    nbd_cli(&["backup", "--quiet", server.uri(), &image]).success();
    says(nbd_cli(&["restore", &image, folder.path()]), &["exists already"]);
    folder.assert_equals(folder.path());
    says(nbd_cli(&["restore", &image, "-"]), &["to a file, a device or an NBD URI"]);
}

#[test]
fn a_base_outside_the_folder_needs_trust() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let (folder, elsewhere) = (Disk::sparse(), Disk::sparse());
    let disk = disk_with_bitmap(&folder, &qemu_img, &qemu_io);
    let server = serve(&qemu_nbd, &disk);
    let full = elsewhere.beside("full.qcow2");
    nbd_cli(&["backup", "--quiet", server.uri(), &full]).success();
    let target = folder.beside("second.qcow2");
    let arguments = ["backup", "--quiet", "-B", "b0", "-b", &full, server.uri(), &target];
    says(nbd_cli(&arguments), &["--trust-image"]);
    assert!(!Path::new(&folder.beside("second.qcow2.partial")).exists());
    nbd_cli(&[&arguments[..], &["--trust-image"]].concat()).success();
    crate::support::image::are_equal(&qemu_img, &disk, &target);
}
