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
fn a_base_in_another_folder_that_the_user_names_needs_no_trust() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let (folder, elsewhere) = (Disk::sparse(), Disk::sparse());
    let disk = disk_with_bitmap(&folder, &qemu_img, &qemu_io);
    let server = serve(&qemu_nbd, &disk);
    let full = elsewhere.beside("full.qcow2");
    nbd_cli(&["backup", "--quiet", server.uri(), &full]).success();
    let target = folder.beside("second.qcow2");
    let arguments = ["backup", "--quiet", "--verify=all", "-B", "b0", "-b", &full];
    nbd_cli(&[&arguments[..], &[server.uri(), &target]].concat()).success();
    crate::support::image::are_equal(&qemu_img, &disk, &target);
    // To restore it the user names one file only, which leads to another folder.
    let restored = folder.beside("restored.img");
    says(nbd_cli(&["restore", &target, &restored]), &["--trust-image"]);
    nbd_cli(&["restore", "--trust-image", &target, &restored]).success();
    crate::support::image::are_equal(&qemu_img, &disk, &restored);
}

#[test]
fn what_such_a_base_names_outside_its_own_folder_still_does() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let (folder, elsewhere) = (Disk::sparse(), Disk::sparse());
    let disk = disk_with_bitmap(&folder, &qemu_img, &qemu_io);
    let secret = folder.blank("secret.img", 64 << 20);
    let base = elsewhere.beside("base.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &secret, "-F", "raw", &base]);
    let server = serve(&qemu_nbd, &disk);
    let target = folder.beside("target.qcow2");
    let arguments = ["backup", "-B", "b0", "-b", &base, server.uri(), &target];
    says(nbd_cli(&arguments), &["--trust-image"]);
    assert!(!Path::new(&folder.beside("target.qcow2.partial")).exists());
}

#[test]
fn options_may_stand_between_the_disk_and_the_new_file() {
    let folder = Disk::sparse();
    let server = Server::ours(&["--read-only", folder.path()]);
    let full = folder.beside("full.qcow2");
    nbd_cli(&["backup", server.uri(), "--quiet", "-C", "1", &full]).success();
    let second = folder.beside("second.qcow2");
    nbd_cli(&["backup", "--quiet", server.uri(), "--verify", &second]).success();
    says(nbd_cli(&["backup", server.uri()]), &["the new file is missing"]);
    says(nbd_cli(&["backup", &second]), &["the disk is missing"]);
    says(nbd_cli(&["backup", &second, "--quiet", &full]), &["not an NBD URI"]);
    assert_eq!(nbd_cli(&["backup", server.uri(), "-q", &second, &full]).code, Some(1));
}
