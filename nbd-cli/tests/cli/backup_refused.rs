//! Contradictory backups and restores are refused and leave no files.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crate::backup_chain::{disk_with_bitmap, serve};
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

#[test]
fn a_bitmap_that_is_not_offered_is_named_with_those_that_are() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let base = directory.beside("base.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &base, "64M"]);
    let target = directory.beside("target.qcow2");
    let server = serve(&qemu_nbd, &disk);
    let arguments = ["backup", "--bitmap", "b1", "--base", &base, server.uri(), &target];
    says(nbd_cli(&arguments), &["no dirty bitmap 'b1'", "'b0'"]);
    assert!(!Path::new(&directory.beside("target.qcow2.partial")).exists());
}

#[test]
fn a_base_of_another_size_is_refused() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let base = directory.beside("base.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &base, "32M"]);
    let target = directory.beside("target.qcow2");
    let server = serve(&qemu_nbd, &disk);
    let arguments = ["backup", "--bitmap", "b0", "--base", &base, server.uri(), &target];
    says(nbd_cli(&arguments), &["67108864", "33554432", "full backup"]);
    assert!(!Path::new(&target).exists());
}

#[test]
fn files_that_exist_are_left_alone() {
    let directory = Disk::sparse();
    let server = Server::ours(&["--read-only", directory.path()]);
    says(nbd_cli(&["backup", server.uri(), directory.path()]), &["exists already"]);
    let image = directory.beside("image.qcow2");
    nbd_cli(&["backup", "--quiet", server.uri(), &image]).success();
    says(nbd_cli(&["restore", &image, directory.path()]), &["exists already"]);
    directory.assert_equals(directory.path());
    // What is meant may be a repository, or an image as the source.
    let folder = directory.beside("");
    says(nbd_cli(&["backup", server.uri(), &folder]), &["is a directory", "--name NAME"]);
    let source = ["backup", directory.path(), &folder];
    says(nbd_cli(&source), &["is not an NBD URI", "add --name NAME"]);
    says(nbd_cli(&["restore", &image, "-"]), &["to a file, a device or an NBD URI"]);
}

#[test]
fn a_base_in_another_directory_that_the_user_names_needs_no_trust() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let (directory, elsewhere) = (Disk::sparse(), Disk::sparse());
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let server = serve(&qemu_nbd, &disk);
    let full = elsewhere.beside("full.qcow2");
    nbd_cli(&["backup", "--quiet", server.uri(), &full]).success();
    let target = directory.beside("second.qcow2");
    let arguments = ["backup", "--quiet", "--verify=all", "-B", "b0", "-b", &full];
    nbd_cli(&[&arguments[..], &[server.uri(), &target]].concat()).success();
    crate::support::image::are_equal(&qemu_img, &disk, &target);
    // To restore it the user names one file only, which leads to another directory.
    let restored = directory.beside("restored.img");
    says(nbd_cli(&["restore", &target, &restored]), &["--trust-image"]);
    nbd_cli(&["restore", "--trust-image", &target, &restored]).success();
    crate::support::image::are_equal(&qemu_img, &disk, &restored);
}

#[test]
fn a_chain_of_backups_in_two_directories_grows_without_trust() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let (directory, elsewhere, third) = (Disk::sparse(), Disk::sparse(), Disk::sparse());
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let server = serve(&qemu_nbd, &disk);
    let mut before = elsewhere.beside("0.qcow2");
    nbd_cli(&["backup", "--quiet", server.uri(), &before]).success();
    for (number, place) in [&directory, &third, &elsewhere, &directory].into_iter().enumerate() {
        let next = place.beside(&format!("{}.qcow2", number + 1));
        let arguments = ["backup", "--quiet", "--verify=all", "-B", "b0", "-b", &before];
        nbd_cli(&[&arguments[..], &[server.uri(), &next]].concat()).success();
        crate::support::image::are_equal(&qemu_img, &disk, &next);
        before = next;
    }
    // A file that is not the backup it is named as needs trust as ever.
    let foreign = elsewhere.blank("foreign.img", 64 << 20);
    let base = third.beside("2.qcow2");
    nbd_cli(&["image", "rebase", "--unsafe", "-b", &foreign, "-F", "raw", &base]).success();
    let next = directory.beside("next.qcow2");
    let arguments = ["backup", "-B", "b0", "--trust-base", "-b", &base, server.uri(), &next];
    says(nbd_cli(&arguments), &["foreign.img", "--trust-image"]);
    let other = elsewhere.beside("other.qcow2");
    nbd_cli(&["backup", "--quiet", server.uri(), &other]).success();
    nbd_cli(&["image", "rebase", "--unsafe", "-b", &other, "-F", "qcow2", &base]).success();
    says(nbd_cli(&arguments), &["other.qcow2", "--trust-image"]);
}

#[test]
fn names_of_backups_need_not_be_text() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let server = serve(&qemu_nbd, &disk);
    let place =
        |name: &[u8]| Path::new(&directory.beside("x")).with_file_name(OsStr::from_bytes(name));
    let (full, second) = (place(b"full\xff.qcow2"), place(b"second\xfe.qcow2"));
    let run = |words: &[&OsStr]| nbd_cli(&[&["backup", "-q"].map(OsStr::new)[..], words].concat());
    let uri = OsStr::new(server.uri());
    run(&[uri, full.as_os_str()]).success();
    let upon = ["--verify=all", "-B", "b0", "-b"].map(OsStr::new);
    run(&[&upon[..], &[full.as_os_str(), uri, second.as_os_str()]].concat()).success();
    let images = [disk.as_ref(), second.as_os_str()];
    peer(&qemu_img, &[&["compare".as_ref()][..], &images].concat());
}

#[test]
fn a_base_that_another_program_writes_to_is_read_all_the_same_if_the_user_says_so() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let server = serve(&qemu_nbd, &disk);
    let (full, next) = (directory.beside("full.qcow2"), directory.beside("next.qcow2"));
    nbd_cli(&["backup", "--quiet", server.uri(), &full]).success();
    let writer = Server::ours(&[&full]);
    let arguments = ["backup", "-q", "-B", "b0", "--trust-base", "-b", &full, server.uri(), &next];
    says(nbd_cli(&arguments), &["full.qcow2", "for writing", "--force-share"]);
    nbd_cli(&[&arguments[..], &["-U", "--verify=all"]].concat()).success();
    writer.end();
    crate::support::image::are_equal(&qemu_img, &disk, &next);
}

#[test]
fn what_such_a_base_names_outside_its_own_directory_still_does() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let (directory, elsewhere) = (Disk::sparse(), Disk::sparse());
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let secret = directory.blank("secret.img", 64 << 20);
    let base = elsewhere.beside("base.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &secret, "-F", "raw", &base]);
    let server = serve(&qemu_nbd, &disk);
    let target = directory.beside("target.qcow2");
    let arguments = ["backup", "-B", "b0", "-b", &base, server.uri(), &target];
    says(nbd_cli(&arguments), &["--trust-image"]);
    assert!(!Path::new(&directory.beside("target.qcow2.partial")).exists());
}

#[test]
fn options_may_stand_between_the_disk_and_the_new_file() {
    let directory = Disk::sparse();
    let server = Server::ours(&["--read-only", directory.path()]);
    let full = directory.beside("full.qcow2");
    nbd_cli(&["backup", server.uri(), "--quiet", "-C", "1", &full]).success();
    let second = directory.beside("second.qcow2");
    nbd_cli(&["backup", "--quiet", server.uri(), "--verify", &second]).success();
    says(nbd_cli(&["backup", server.uri()]), &["the new file is missing"]);
    says(nbd_cli(&["backup", &second]), &["the disk is missing"]);
    says(nbd_cli(&["backup", &second, "--quiet", &full]), &["not an NBD URI"]);
    assert_eq!(nbd_cli(&["backup", server.uri(), "-q", &second, &full]).code, Some(1));
}
