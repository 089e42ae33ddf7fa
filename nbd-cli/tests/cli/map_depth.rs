//! `map --context` with other contexts than base:allocation.

use crate::support::{Disk, Server, nbd_cli, peer};
use crate::tools;

#[test]
fn the_layers_of_a_chain_are_shown_as_nbdinfo_shows_them() {
    tools!(nbdinfo = "nbdinfo", qemu_nbd = "qemu-nbd", qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = disk.beside("overlay.qcow2");
    let create = ["create", "-f", "qcow2", "-b", disk.path(), "-F", "raw", &overlay];
    peer(&qemu_img, &create);
    peer(&qemu_io, &["-f", "qcow2", "-c", "write 2M 128k", &overlay]);
    let server = Server::qemu_nbd(&qemu_nbd, "x", &["-f", "qcow2", "-A", &overlay]);
    let context = "qemu:allocation-depth";
    let theirs = peer(&nbdinfo, &[&*format!("--map={context}"), server.uri()]);
    let ours = nbd_cli(&["map", "--context", context, server.uri()]).success();
    let words = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    assert_eq!(words(&ours), words(&theirs));
    assert!(ours.contains("backing depth 2"), "{ours}");
}

#[test]
fn our_raw_image_is_one_layer() {
    let disk = Disk::sparse();
    let server = Server::ours(&["-A", disk.path()]);
    let map = nbd_cli(&["map", "--context", "qemu:allocation-depth", server.uri()]).success();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "8388608", "1", "local"]);
}
