//! `copy` obeys the block sizes of servers.

use crate::support::{Disk, Server, nbd_cli};
use crate::tools;

#[test]
fn requests_are_aligned_to_the_minimum() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let copied = disk.beside("copy.img");
    for (minimum, maximum) in [("512", "64K"), ("4096", "64K"), ("65536", "64K")] {
        let minimum = format!("blocksize-minimum={minimum}");
        let maximum = format!("blocksize-maximum={maximum}");
        let preferred = "blocksize-preferred=65536";
        let strict = "blocksize-error-policy=error";
        let filter = "--filter=blocksize-policy";
        let arguments = [filter, "memory", "8M", &minimum, preferred, &maximum, strict];
        let server = Server::nbdkit(&nbdkit, &arguments);
        nbd_cli(&["copy", "--sparse", "512", disk.path(), server.uri()]).success();
        nbd_cli(&["copy", server.uri(), &copied]).success();
        disk.assert_equals(&copied);
    }
}

#[test]
fn a_size_that_cannot_be_aligned_is_refused() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let odd = disk.blank("odd.img", 1_000_001);
    let arguments = ["--filter=blocksize-policy", "memory", "8M", "blocksize-minimum=4096"];
    let server = Server::nbdkit(&nbdkit, &arguments);
    let error = nbd_cli(&["copy", &odd, server.uri()]).failure();
    assert!(error.contains("aligned to 4K"), "{error}");
}
