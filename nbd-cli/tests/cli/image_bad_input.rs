//! Every command refuses bad images with one clear sentence and leaves them unchanged.

use crate::support::image::chain;
use crate::support::{Disk, nbd_cli, peer, says};
use crate::tools;

/// Every command that opens an image, on this one.
fn all_commands(disk: &Disk, image: &str, reason: &str) {
    let before = std::fs::read(image).expect("the image");
    let new = disk.beside("new.img");
    let commands: &[&[&str]] = &[
        &["map", image],
        &["convert", image, &new],
        &["resize", image, "+1M"],
        &["rebase", "--no-backing", image],
        &["commit", image],
        &["snapshot", "create", image, "name"],
        &["snapshot", "apply", image, "name"],
        &["snapshot", "delete", image, "name"],
        &["measure", image],
    ];
    for command in commands {
        says(nbd_cli(&[&["image"], *command].concat()), &[reason]);
        assert!(std::fs::read(image).expect("the image") == before, "{command:?}");
        assert!(!std::path::Path::new(&new).exists(), "{command:?}");
    }
    let outcome = nbd_cli(&["image", "compare", image, disk.path()]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stderr.contains(reason), "{outcome:?}");
}

/// As [`all_commands`], and those that look at one file only.
fn every_command(disk: &Disk, image: &str, reason: &str) {
    all_commands(disk, image, reason);
    let outcome = nbd_cli(&["image", "info", image]);
    says(outcome, &[image, reason]);
    let outcome = nbd_cli(&["image", "check", image]);
    says(outcome, &[image, reason]);
}

fn with_header(disk: &Disk, change: impl FnOnce(&mut Vec<u8>)) -> Option<String> {
    let qemu_img = crate::support::tool("qemu-img")?;
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    let mut bytes = std::fs::read(&image).expect("the image");
    change(&mut bytes);
    std::fs::write(&image, bytes).expect("room");
    Some(image)
}

#[test]
fn a_truncated_header() {
    let disk = Disk::sparse();
    let Some(image) = with_header(&disk, |bytes| bytes.truncate(50)) else { return };
    every_command(&disk, &image, "cut off");
}

#[test]
fn an_unknown_feature() {
    let disk = Disk::sparse();
    let Some(image) = with_header(&disk, |bytes| bytes[72] = 0x20) else { return };
    every_command(&disk, &image, "features that are not known here");
}

#[test]
fn a_table_outside_the_file() {
    let disk = Disk::sparse();
    let Some(image) = with_header(&disk, |bytes| bytes[42] = 0x40) else { return };
    all_commands(&disk, &image, "outside the file");
    says(nbd_cli(&["image", "info", &image]), &[&image, "outside the file"]);
    let checked = nbd_cli(&["image", "check", &image]);
    assert_eq!(checked.code, Some(2), "{checked:?}");
    assert!(checked.stdout.contains("an L1 table at"), "{checked:?}");
}

#[test]
fn a_size_of_2_to_the_63() {
    let disk = Disk::sparse();
    let Some(image) = with_header(&disk, |bytes| bytes[24] = 0x80) else { return };
    every_command(&disk, &image, "is not possible");
}

#[test]
fn a_backing_file_that_is_missing_elsewhere_or_of_another_format() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    for (name, format, reason) in [
        ("missing.img", "raw", "missing.img"),
        ("/etc/passwd", "raw", "--trust-image"),
        ("nbd://localhost/disk", "raw", "nbd:"),
        ("disk.img", "qcow2", "disk.img"),
        ("disk.img", "dmg", "DMG"),
        // It locks itself out before it is found to be its own backing file.
        ("overlay.qcow2", "qcow2", "overlay.qcow2"),
    ] {
        let disk = Disk::sparse();
        let image = chain(&disk, &qemu_img, &qemu_io);
        peer(&qemu_img, &["rebase", "-u", "-b", name, "-F", format, &image]);
        all_commands(&disk, &image, reason);
        nbd_cli(&["image", "info", &image]).success();
    }
}

#[test]
fn a_chain_that_leads_back_to_itself() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = chain(&disk, &qemu_img, &qemu_io);
    let middle = disk.beside("middle.qcow2");
    peer(&qemu_img, &["rebase", "-u", "-b", "overlay.qcow2", "-F", "qcow2", &middle]);
    for command in [&["map", &image][..], &["info", "--backing-chain", &image]] {
        says(nbd_cli(&[&["image"], command].concat()), &["leads back to itself"]);
    }
    nbd_cli(&["image", "rebase", "--unsafe", "-b", "disk.img", "-F", "raw", &middle]).success();
    nbd_cli(&["image", "map", &image]).success();
}

#[test]
fn an_image_that_somebody_writes_is_left_alone() {
    let disk = Disk::sparse();
    let Some(image) = with_header(&disk, |_| {}) else { return };
    let socket = disk.beside("socket");
    let mut server = std::process::Command::new(crate::support::PROGRAM);
    server.args(["serve", "--format", "qcow2", "--socket", &socket, &image]);
    let server = crate::support::Server::start(&mut server, (&socket).into());
    for command in [&["resize", &image, "+1M"][..], &["snapshot", "create", &image, "x"]] {
        let all = [&["image"], command].concat();
        says(nbd_cli(&all), &[&image]);
    }
    server.end();
    nbd_cli(&["image", "resize", &image, "+1M"]).success();
}
