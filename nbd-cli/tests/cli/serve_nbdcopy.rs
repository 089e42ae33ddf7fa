//! nbdcopy as the judge of our server.

use crate::support::{Disk, Server, peer};
use crate::tools;

#[test]
fn it_copies_out_and_in_over_several_connections() {
    tools!(nbdcopy = "nbdcopy");
    let disk = Disk::sparse();
    let blank = disk.blank("blank.img", 8 << 20);
    let (from, to) = (Server::ours(&["--read-only", disk.path()]), Server::ours(&[&blank]));
    for connections in ["--connections=1", "--connections=4"] {
        let copied = disk.beside("copy.img");
        peer(&nbdcopy, &[connections, from.uri(), &copied]);
        disk.assert_equals(&copied);
    }
    peer(&nbdcopy, &["--flush", from.uri(), to.uri()]);
    to.end();
    disk.assert_equals(&blank);
}

#[test]
fn what_it_writes_reads_back() {
    tools!(nbdcopy = "nbdcopy");
    let disk = Disk::sparse();
    let server = Server::ours(&["memory:8M"]);
    let copied = disk.beside("copy.img");
    peer(&nbdcopy, &["--allocated", disk.path(), server.uri()]);
    peer(&nbdcopy, &[server.uri(), &copied]);
    disk.assert_equals(&copied);
}
