//! `serve --temporary`, `--discard` and `--detect-zeroes`, seen through qemu-io and in the files.

use crate::support::image::{chain, changed_since_snapshot, is_clean, ours};
use crate::support::{Disk, Server, is_sparse_here, nbd_cli, peer, says};
use crate::tools;

#[test]
fn what_is_written_to_a_temporary_overlay_is_gone_afterwards() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    for path in [disk.path(), overlay.as_str()] {
        let before = std::fs::read(path).expect("the image");
        let server = Server::ours(&["--temporary", path]);
        peer(&qemu_img, &["compare", server.uri(), path]);
        let write = ["-f", "raw", "-c", "write -P 9 1M 3M", "-c", "read -P 9 1M 3M", server.uri()];
        let said = peer(&qemu_io, &write);
        assert!(said.contains("read 3145728/3145728") && !said.contains("failed"), "{said}");
        server.end();
        assert!(std::fs::read(path).expect("the image") == before, "{path} was changed");
    }
}

#[test]
fn a_temporary_overlay_follows_no_name_that_is_not_allowed() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = chain(&disk, &qemu_img, &qemu_io);
    peer(&qemu_img, &["rebase", "-u", "-b", "/etc/passwd", "-F", "raw", &image]);
    let outcome = nbd_cli(&["serve", "--temporary", "--run", "true", &image]);
    says(outcome, &["/etc/passwd", "only files below"]);
    let outcome = nbd_cli(&["serve", "--temporary", "--run", "true", "memory:1M"]);
    says(outcome, &["memory:1M", "--temporary"]);
}

#[test]
fn a_temporary_overlay_over_a_snapshot_shows_it_and_leaves_it_alone() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = changed_since_snapshot(&disk, &qemu_img, &qemu_io);
    let before = std::fs::read(&image).expect("the image");
    let server = Server::ours(&["--temporary", "--snapshot", "before", &image]);
    peer(&qemu_img, &["compare", server.uri(), disk.path()]);
    let write = ["-f", "raw", "-c", "write -P 9 1M 3M", "-c", "read -P 9 1M 3M", server.uri()];
    let said = peer(&qemu_io, &write);
    assert!(said.contains("read 3145728/3145728") && !said.contains("failed"), "{said}");
    server.end();
    assert!(std::fs::read(&image).expect("the image") == before, "the image was changed");
}

#[test]
fn discards_are_ignored_if_told_so() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let commands = ["-f", "raw", "-d", "unmap", "-c", "discard 0 1M", "-c", "write -zu 0 1M"];
    for (choice, keeps) in [("ignore", true), ("unmap", false)] {
        let server = Server::ours(&["--format", "raw", "--discard", choice, disk.path()]);
        peer(&qemu_io, &[&commands[..], &[server.uri()]].concat());
        server.end();
        assert_eq!(allocated(disk.path()) >= 1 << 20, keeps, "{choice}");
    }
}

#[test]
fn zeroes_that_are_written_are_found_if_told_so() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    for (choice, data) in [("off", true), ("on", false), ("unmap", false)] {
        let image = disk.beside(&format!("{choice}.qcow2"));
        nbd_cli(&["image", "create", "-f", "qcow2", &image, "1M"]).success();
        let server = Server::ours(&["--detect-zeroes", choice, &image]);
        peer(&qemu_io, &["-f", "raw", "-c", "write -P 0 0 512k", server.uri()]);
        server.end();
        let map = ours(&["map", "--json", &image]);
        assert_eq!(map[0]["data"], data, "{choice}: {map}");
        is_clean(&qemu_img, &image);
    }
}
