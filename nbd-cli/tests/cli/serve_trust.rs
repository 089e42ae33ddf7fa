//! `serve --trust-image`: backing files in other directories and on servers.

use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

#[test]
fn a_backing_file_elsewhere_is_opened_only_if_the_image_is_trusted() {
    tools!(qemu_img = "qemu-img");
    let (base, disk) = (Disk::sparse(), Disk::sparse());
    let overlay = disk.beside("overlay.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-b", base.path(), "-F", "raw", &overlay];
    peer(&qemu_img, &create);
    let outcome = nbd_cli(&["serve", "--run", "true", &overlay]);
    says(outcome, &[base.path(), "--trust-image"]);
    let server = Server::ours(&["--trust-image", &overlay]);
    peer(&qemu_img, &["compare", server.uri(), base.path()]);
    server.end();
}

#[test]
fn a_backing_file_on_a_server_is_read_and_written_over() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let base = Server::qemu_nbd(&qemu_nbd, "base", &["-r", "-f", "raw", disk.path()]);
    let overlay = disk.beside("overlay.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-b", base.uri(), "-F", "raw", &overlay];
    peer(&qemu_img, &create);
    let outcome = nbd_cli(&["serve", "--run", "true", &overlay]);
    says(outcome, &["'nbd", "not allowed", "--trust-image"]);
    for arguments in [&["--trust-image"][..], &["--trust-image", "--temporary"]] {
        let server = Server::ours(&[arguments, &[&overlay]].concat());
        peer(&qemu_img, &["compare", server.uri(), disk.path()]);
        let write =
            ["-f", "raw", "-c", "write -P 9 1000 3M", "-c", "read -P 9 1000 3M", server.uri()];
        let said = peer(&qemu_io, &write);
        assert!(said.contains("read 3145728/3145728") && !said.contains("failed"), "{said}");
        // Undone, so that the next round finds what it expects.
        server.end();
        if arguments.len() == 1 {
            peer(&qemu_img, &["check", "-q", &overlay]);
            std::fs::remove_file(&overlay).expect("the overlay");
            peer(&qemu_img, &create);
        }
    }
}
