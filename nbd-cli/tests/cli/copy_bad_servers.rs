//! `copy` from and to servers that fail.

use crate::support::{Disk, Server, nbd_cli};
use crate::tools;

#[test]
fn a_read_error_ends_the_copy_and_says_where() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let copied = disk.beside("copy.img");
    let filter = ["--filter=error", "pattern", "8M", "error-pread=EIO", "error-pread-rate=100%"];
    let server = Server::nbdkit(&nbdkit, &filter);
    let error = nbd_cli(&["copy", server.uri(), &copied]).failure();
    for part in [server.uri(), "at offset", &format!("'{copied}' is incomplete")] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_write_error_ends_the_copy() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let filter =
        ["--filter=error", "memory", "8M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"];
    let server = Server::nbdkit(&nbdkit, &filter);
    let error = nbd_cli(&["copy", disk.path(), server.uri()]).failure();
    assert!(error.contains("cannot write to") && error.contains("is incomplete"), "{error}");
}

#[test]
fn occasional_errors_never_pass_for_success() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let copied = disk.beside("copy.img");
    let file = format!("file={}", disk.path());
    let filter = ["--filter=error", "file", &file, "error-pread=EIO", "error-pread-rate=30%"];
    for _ in 0..5 {
        // nbdkit sometimes aborts when a client leaves after such an error.
        let server = Server::nbdkit(&nbdkit, &filter);
        let arguments = ["copy", "--request-size", "64K", server.uri(), &copied];
        match nbd_cli(&arguments) {
            outcome if outcome.code == Some(0) => disk.assert_equals(&copied),
            outcome => assert!(outcome.failure().contains("is incomplete")),
        }
    }
}

#[test]
fn a_slow_server_is_waited_for() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let copied = disk.beside("copy.img");
    let file = format!("file={}", disk.path());
    let server = Server::nbdkit(&nbdkit, &["--filter=delay", "file", &file, "rdelay=20ms"]);
    nbd_cli(&["copy", server.uri(), &copied]).success();
    disk.assert_equals(&copied);
}
