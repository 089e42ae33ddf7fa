//! `image info`, `map`, `compare` and `measure` of exports, beside qemu-img.

use serde_json::Value;

use crate::support::image::{chain, json, ours, write};
use crate::support::{Disk, Server, is_sparse_here, nbd_cli, peer, says};
use crate::tools;

#[test]
fn info_says_what_the_server_offers() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let theirs = Server::qemu_nbd(&qemu_nbd, "disk", &["-A", "-r", "-f", "qcow2", &overlay]);
    let own = Server::ours(&["--read-only", "--allocation-depth", "--format", "qcow2", &overlay]);
    for server in [&theirs, &own] {
        let found = ours(&["info", "--json", server.uri()]);
        let expected = json(&qemu_img, &["info", "--output=json", server.uri()]);
        for key in ["format", "virtual-size"] {
            assert_eq!(found[key], expected[key], "{key}");
        }
        assert_eq!(found["filename"], server.uri());
        assert!(found.get("actual-size").is_none(), "{found}");
        let export = &found["server"]["exports"][0];
        assert_eq!(export["is_read_only"], true, "{found}");
        let contexts = export["contexts"].as_array().expect("a list");
        assert!(contexts.contains(&"qemu:allocation-depth".into()), "{found}");
        let text = nbd_cli(&["image", "info", server.uri()]).success();
        for part in ["8.0 MiB (8388608 bytes)", "without TLS", "read_only", "base:allocation"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
    let wrong = theirs.uri().replace("/disk?", "/other?");
    says(nbd_cli(&["image", "info", &wrong]), &["no export named 'other'", "'disk'"]);
}

#[test]
fn info_looks_into_an_image_inside_an_export_only_if_told() {
    tools!(qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let image = disk.beside("inside.qcow2");
    peer(
        &qemu_img,
        &["create", "-q", "-f", "qcow2", "-b", "missing", "-F", "raw", "-u", &image, "1M"],
    );
    let server = Server::qemu_nbd(&qemu_nbd, "x", &["-r", "-f", "raw", &image]);
    assert_eq!(ours(&["info", "--json", server.uri()])["format"], "raw");
    let found = ours(&["info", "--json", "--format", "qcow2", server.uri()]);
    assert_eq!(found["virtual-size"], 1 << 20);
    assert_eq!(found["backing-filename"], "missing");
}

#[test]
fn the_map_is_what_the_server_says() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd", nbdkit = "nbdkit");
    let disk = Disk::sparse();
    if is_sparse_here(&disk).is_none() {
        return;
    }
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    write(&qemu_io, &overlay, "discard 5M 64k");
    let servers = [
        Server::qemu_nbd(&qemu_nbd, "disk", &["-r", "-f", "qcow2", &overlay]),
        Server::nbdkit(&nbdkit, &["file", disk.path()]),
        Server::nbdkit(&nbdkit, &["--filter=noextents", "file", disk.path()]),
    ];
    for server in servers {
        let found = ours(&["map", "--json", server.uri()]);
        let theirs = json(&qemu_img, &["map", "--output=json", server.uri()]);
        assert_eq!(found, theirs, "{}", server.uri());
    }
    let said = nbd_cli(&["image", "map", "nbd+unix:///?socket=/nowhere/at/all"]);
    says(said, &["/nowhere/at/all", "is the server running"]);
}

#[test]
fn a_server_that_tells_the_layers_shows_them_as_the_image_does() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let theirs = Server::qemu_nbd(&qemu_nbd, "disk", &["-A", "-r", "-f", "qcow2", &overlay]);
    let own = Server::ours(&["--read-only", "--allocation-depth", "--format", "qcow2", &overlay]);
    let expected = sectors(&json(&qemu_img, &["map", "--output=json", &overlay]));
    for server in [&theirs, &own] {
        assert_eq!(sectors(&ours(&["map", "--json", server.uri()])), expected);
    }
    let text = nbd_cli(&["image", "map", own.uri()]).success();
    assert!(text.lines().any(|line| line.contains("  1  data  ")), "{text}");
}

/// The layer, and whether it is zero, of every sector.
fn sectors(map: &Value) -> Vec<(u64, bool)> {
    let mut sectors = Vec::new();
    for part in map.as_array().expect("a list") {
        let number = |key: &str| part[key].as_u64().expect("a number");
        assert_eq!(number("start"), sectors.len() as u64 * 512);
        let zero = part["zero"] == true;
        let layer = number("depth");
        sectors.extend(std::iter::repeat_n((layer, zero), number("length") as usize / 512));
    }
    sectors
}

#[test]
fn compare_takes_files_and_exports_on_either_side() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let theirs = Server::qemu_nbd(&qemu_nbd, "disk", &["-r", "-f", "qcow2", &overlay]);
    let own = Server::ours(&["--read-only", disk.path()]);
    let compare = |first: &str, second: &str| nbd_cli(&["image", "compare", first, second]);
    assert_eq!(compare(&overlay, theirs.uri()).success(), "the disks are the same\n");
    assert_eq!(compare(own.uri(), disk.path()).success(), "the disks are the same\n");
    let said = compare(theirs.uri(), own.uri());
    assert_eq!(said.code, Some(1), "{said:?}");
    let local = compare(&overlay, disk.path());
    assert_eq!(said.stdout, local.stdout);
    let gone = own.uri().to_owned();
    own.end();
    let said = compare(disk.path(), &gone);
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("is the server running"), "{said:?}");
}

#[test]
fn what_a_server_says_to_be_zero_is_not_compared_byte_by_byte() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let huge = Server::nbdkit(&nbdkit, &["--filter=error", "memory", "64G", "error-pread-rate=1"]);
    let empty = disk.blank("empty.img", 1 << 20);
    let said = nbd_cli(&["image", "compare", &empty, huge.uri()]);
    assert_eq!(said.success(), "the disks are the same\n");
}

#[test]
fn the_measures_of_an_export_are_those_of_qemu_img() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let theirs = Server::qemu_nbd(&qemu_nbd, "disk", &["-r", "-f", "qcow2", &overlay]);
    let own = Server::ours(&["--read-only", "--allocation-depth", "--format", "qcow2", &overlay]);
    for server in [&theirs, &own] {
        for format in ["raw", "qcow2"] {
            let found = ours(&["measure", "--json", "-O", format, server.uri()]);
            let options = ["measure", "--output=json", "-O", format, server.uri()];
            let expected = json(&qemu_img, &options);
            for key in ["required", "fully-allocated"] {
                assert_eq!(found[key], expected[key], "{key} {format}");
            }
        }
    }
}

#[test]
fn an_image_in_an_export_is_checked_and_looked_into() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let path = disk.beside("disk.qcow2");
    peer(&qemu_img, &["convert", "-f", "raw", "-O", "qcow2", disk.path(), &path]);
    peer(&qemu_img, &["snapshot", "-c", "first", &path]);
    peer(&qemu_img, &["bitmap", "--add", &path, "daily"]);
    write(&qemu_io, &path, "write -P 99 0 64k");
    let server = Server::ours(&["--read-only", "--format", "raw", &path]);
    let uri = server.uri();
    let on_file = nbd_cli(&["image", "check", &path]);
    for options in [&[][..], &["--format", "qcow2"]] {
        let checked = nbd_cli(&[&["image", "check"], options, &[uri]].concat());
        assert_eq!((checked.code, &checked.stdout), (Some(0), &on_file.stdout), "{checked:?}");
    }
    let theirs = crate::support::run(
        std::process::Command::new(&qemu_img).args(["check", "-f", "qcow2", uri]),
    );
    assert_eq!(theirs.code, Some(0), "{theirs:?}");
    let refused = nbd_cli(&["image", "check", "--repair", "all", uri]);
    says(refused, &["an export is only checked"]);
    let raw = Server::ours(&["--read-only", "--format", "raw", disk.path()]);
    assert_eq!(nbd_cli(&["image", "check", raw.uri()]).code, Some(63));
    for command in [&["image", "snapshot", "list"][..], &["bitmap", "list"]] {
        let of_file = nbd_cli(&[command, &[&path]].concat()).success();
        let of_export = nbd_cli(&[command, &["--format", "qcow2", uri]].concat()).success();
        assert_eq!(of_export, of_file, "{command:?}");
        assert!(of_file.contains("first") || of_file.contains("daily"), "{of_file}");
    }
}
