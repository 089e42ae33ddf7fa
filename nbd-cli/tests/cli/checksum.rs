//! `nbd-cli checksum`: the digest that sha256sum has for the raw disk, whatever holds it.

use std::path::Path;

use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

/// The digest of a raw file by another program.
fn theirs(tool: &Path, file: &str) -> String {
    peer(tool, &[file]).split(' ').next().expect("a digest").to_owned()
}

fn ours(arguments: &[&str]) -> String {
    let line = nbd_cli(&[&["checksum", "-q"], arguments].concat()).success();
    line.split(' ').next().expect("a digest").to_owned()
}

#[test]
fn checksums_are_those_of_the_raw_disk_for_every_format_and_server() {
    tools!(
        sha256sum = "sha256sum",
        sha512sum = "sha512sum",
        qemu_img = "qemu-img",
        nbdkit = "nbdkit"
    );
    let disk = Disk::sparse();
    let raw = disk.path();
    let expected = theirs(&sha256sum, raw);
    assert_eq!(nbd_cli(&["checksum", "-q", raw]).success(), format!("{expected}  {raw}\n"));
    assert_eq!(ours(&["-a", "sha512", raw]), theirs(&sha512sum, raw));
    let (qcow2, compressed, overlay) =
        (disk.beside("a.qcow2"), disk.beside("c.qcow2"), disk.beside("o.qcow2"));
    peer(&qemu_img, &["convert", "-f", "raw", "-O", "qcow2", raw, &qcow2]);
    peer(&qemu_img, &["convert", "-c", "-f", "raw", "-O", "qcow2", raw, &compressed]);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &qcow2, "-F", "qcow2", &overlay]);
    for image in [&qcow2, &compressed, &overlay] {
        assert_eq!(ours(&[image]), expected, "{image}");
    }
    for server in [Server::nbdkit(&nbdkit, &["file", raw]), Server::ours(&["-r", &overlay])] {
        assert_eq!(ours(&[server.uri()]), expected, "{}", server.uri());
    }
    // A size that is not a multiple of anything.
    let odd = disk.beside("odd.img");
    std::fs::write(&odd, &disk.content()[..3_000_001]).expect("room");
    assert_eq!(ours(&["--format", "raw", &odd]), theirs(&sha256sum, &odd));
    std::fs::write(&odd, "").expect("room");
    assert_eq!(ours(&["--format", "raw", &odd]), theirs(&sha256sum, &odd));
}

/// Known to libnbd's test of `nbdcopy --blkhash` for the same disk.
const BLKHASH_OF_A_PATTERN_OF_1G: &str =
    "6750a1c3d78e46eaffb0d094624825dea88f0c7098b2424fce776c0748442649";

#[test]
fn block_hashes_are_those_of_nbdcopy_for_every_format() {
    tools!(qemu_img = "qemu-img", nbdkit = "nbdkit");
    let server = Server::nbdkit(&nbdkit, &["pattern", "1G"]);
    let pattern = ours(&["-a", "blkhash", "-f", "raw", server.uri()]);
    assert_eq!(pattern, BLKHASH_OF_A_PATTERN_OF_1G);
    let disk = Disk::sparse();
    let (qcow2, odd) = (disk.beside("a.qcow2"), disk.beside("odd.img"));
    peer(&qemu_img, &["convert", "-f", "raw", "-O", "qcow2", disk.path(), &qcow2]);
    let raw = ours(&["-a", "blkhash", disk.path()]);
    assert_eq!(ours(&["-a", "blkhash", &qcow2]), raw);
    // The last block is incomplete, and the size counts.
    std::fs::write(&odd, &disk.content()[..3_000_001]).expect("room");
    assert_ne!(ours(&["-a", "blkhash", "-f", "raw", &odd]), raw);
    nbd_cli(&["checksum", "-q", "-a", "blkhash", "--expect", &raw, &qcow2]).success();
}

#[test]
fn checksums_of_snapshots_are_those_of_their_moment() {
    tools!(sha256sum = "sha256sum", qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let qcow2 = disk.beside("a.qcow2");
    peer(&qemu_img, &["convert", "-f", "raw", "-O", "qcow2", disk.path(), &qcow2]);
    peer(&qemu_img, &["snapshot", "-c", "monday", &qcow2]);
    peer(&qemu_io, &["-f", "qcow2", "-c", "write -P 7 1M 64k", &qcow2]);
    let expected = theirs(&sha256sum, disk.path());
    assert_eq!(ours(&["--snapshot", "monday", &qcow2]), expected);
    assert_ne!(ours(&[&qcow2]), expected);
    says(nbd_cli(&["checksum", "--snapshot", "friday", &qcow2]), &["friday"]);
}

#[test]
fn an_expected_checksum_is_compared() {
    let disk = Disk::sparse();
    let checksum = ours(&[disk.path()]);
    ours(&["--expect", &checksum.to_uppercase(), disk.path()]);
    let wrong = checksum.replace(|digit: char| digit != '0', "0");
    let outcome = nbd_cli(&["checksum", "-q", "--expect", &wrong, disk.path()]);
    says(outcome, &["has another sha256 than expected", &checksum]);
    let short = nbd_cli(&["checksum", "-q", "--expect", "abc", disk.path()]);
    says(short, &["is not a sha256", "64 hexadecimal digits"]);
}

#[test]
fn a_disk_that_cannot_be_read_has_no_checksum() {
    tools!(nbdkit = "nbdkit");
    let arguments = ["--filter=error", "pattern", "8M", "error-pread-rate=100%"];
    let server = Server::nbdkit(&nbdkit, &arguments);
    let outcome = nbd_cli(&["checksum", "-q", "--format", "raw", server.uri()]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""), "{outcome:?}");
}
