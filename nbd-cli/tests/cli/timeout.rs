//! `--timeout`: servers that hang are not waited for.

use crate::support::{Disk, Server, nbd_cli, says};
use crate::tools;

#[test]
fn a_server_that_hangs_ends_the_copy_in_words() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let slow = ["--filter=delay", "pattern", "8M", "rdelay=3600"];
    let server = Server::nbdkit(&nbdkit, &slow);
    let copy = disk.beside("copy.img");
    let said = nbd_cli(&["copy", "--timeout", "300ms", server.uri(), &copy]);
    says(said, &["did not answer", "within 0.3 s", "is incomplete"]);
    // nbdkit may abort when a client leaves it in the middle of a request.
    let server = Server::nbdkit(&nbdkit, &slow);
    let target = disk.beside("backup.qcow2");
    let arguments = ["backup", "--timeout", "300ms", "--reconnect", "100ms", server.uri(), &target];
    says(nbd_cli(&arguments), &["did not answer", "within 0.3 s"]);
}

#[test]
fn a_server_that_answers_in_time_is_not_given_up() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let file = format!("file={}", disk.path());
    let server = Server::nbdkit(&nbdkit, &["--filter=delay", "file", &file, "rdelay=20ms"]);
    let copy = disk.beside("copy.img");
    nbd_cli(&["copy", "--timeout", "20s", server.uri(), &copy]).success();
    disk.assert_equals(copy);
}
