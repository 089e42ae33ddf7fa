//! Images, and their check by qemu-img.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{Disk, nbd_cli, peer, run};

/// Arguments of qemu-img that say no more than needed.
#[track_caller]
pub(crate) fn json(tool: &Path, arguments: &[&str]) -> Value {
    serde_json::from_str(&peer(tool, arguments)).expect("JSON")
}

/// What qemu-img says about an image.
#[track_caller]
pub(crate) fn info(tool: &Path, path: &str) -> Value {
    json(tool, &["info", "--output=json", path])
}

/// What we say, as JSON.
#[track_caller]
pub(crate) fn ours(arguments: &[&str]) -> Value {
    let all: Vec<_> = ["image"].iter().chain(arguments).copied().collect();
    nbd_cli(&all).json()
}

/// Checks that qemu-img finds nothing wrong.
#[track_caller]
pub(crate) fn is_clean(tool: &Path, path: &str) {
    peer(tool, &["check", "-q", path]);
}

/// Checks that qemu-img sees the same disk in both.
#[track_caller]
pub(crate) fn are_equal(tool: &Path, first: &str, second: &str) {
    let outcome = run(Command::new(tool).args(["compare", first, second]));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

/// Writes a byte to a part of a disk with qemu-io.
#[track_caller]
pub(crate) fn write(qemu_io: &Path, path: &str, command: &str) {
    let said = peer(qemu_io, &["-f", "qcow2", "-c", command, path]);
    assert!(!said.contains("failed"), "{said}");
}

/// The content as QEMU decrypts it.
pub(crate) fn decrypted(
    disk: &Disk,
    qemu_img: &Path,
    format: &str,
    image: &str,
    key: &str,
) -> Vec<u8> {
    let copy = disk.beside("decrypted");
    let secret = format!("secret,id=s,file={key}");
    let key = if format == "luks" { "key-secret" } else { "encrypt.key-secret" };
    let driver = format!("driver={format},{key}=s,file.filename={image}");
    let start = ["convert", "--object", &secret, "--image-opts", &driver];
    peer(qemu_img, &[&start[..], &["-O", "raw", &copy]].concat());
    std::fs::read(copy).expect("the copy")
}

/// A qcow2 image with the disk in its snapshot `before`, and other data since then.
pub(crate) fn changed_since_snapshot(disk: &Disk, qemu_img: &Path, qemu_io: &Path) -> String {
    let image = disk.beside("image.qcow2");
    peer(qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    peer(qemu_img, &["snapshot", "-c", "before", &image]);
    write(qemu_io, &image, "write -P 1 0 2M");
    image
}

/// An overlay `overlay.qcow2` over `middle.qcow2` over the disk, with data, zeroes and discarded
/// parts of its own in every layer. Made by QEMU.
pub(crate) fn chain(disk: &Disk, qemu_img: &Path, qemu_io: &Path) -> String {
    let (middle, overlay) = (disk.beside("middle.qcow2"), disk.beside("overlay.qcow2"));
    let over = |backing, format, path| {
        peer(qemu_img, &["create", "-q", "-f", "qcow2", "-b", backing, "-F", format, path]);
    };
    over("disk.img", "raw", &middle);
    write(qemu_io, &middle, "write -P 17 192k 100k");
    write(qemu_io, &middle, "write -z 512k 128k");
    over("middle.qcow2", "qcow2", &overlay);
    write(qemu_io, &overlay, "write -P 34 256k 64k");
    write(qemu_io, &overlay, "write -P 51 6M 1000");
    write(qemu_io, &overlay, "write -z 4M 64k");
    overlay
}
