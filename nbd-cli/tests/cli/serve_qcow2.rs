//! qcow2 images are served like raw ones; qemu-img judges.

use crate::support::{Disk, Server, nbd_cli, peer};
use crate::tools;

#[test]
fn what_is_written_is_in_the_image_and_the_image_is_clean() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("disk.qcow2");
    peer(&qemu_img, &["create", "-f", "qcow2", &image, "8M"]);
    let server = Server::ours(&[&image]);
    nbd_cli(&["copy", "--flush", disk.path(), server.uri()]).success();
    server.end();
    peer(&qemu_img, &["check", &image]);
    peer(&qemu_img, &["compare", "-f", "raw", "-F", "qcow2", disk.path(), &image]);
}

#[test]
fn the_layers_of_a_chain_show() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = disk.beside("overlay.qcow2");
    peer(&qemu_img, &["create", "-f", "qcow2", "-b", disk.path(), "-F", "raw", &overlay]);
    peer(&qemu_io, &["-f", "qcow2", "-c", "write -P 9 2M 64k", &overlay]);
    let server = Server::ours(&["--read-only", "-A", &overlay]);
    let map = nbd_cli(&["map", "--context", "qemu:allocation-depth", server.uri()]).success();
    let map: Vec<Vec<_>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        map,
        [
            vec!["0", "2097152", "2", "backing", "depth", "2"],
            vec!["2097152", "65536", "1", "local"],
            vec!["2162688", "6225920", "2", "backing", "depth", "2"],
        ]
    );
}
