//! `serve nbd://…`: a re-exported export of another server.

use std::process::Command;

use crate::support::tls::Certificates;
use crate::support::{Disk, PROGRAM, Server, image, is_sparse_here, nbd_cli, peer, says};
use crate::tools;

/// What `nbd-cli map` says about a context of an export.
#[track_caller]
fn map(uri: &str, context: &str) -> String {
    nbd_cli(&["map", "--json", "--context", context, uri]).success()
}

#[test]
fn what_clients_do_reaches_the_other_server() {
    tools!(qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    for theirs in [true, false] {
        let file = disk.blank("disk.img", 8 << 20);
        let upstream = match theirs {
            true => Server::qemu_nbd(&qemu_nbd, "vm", &["--discard=unmap", "-f", "raw", &file]),
            false => Server::ours(&["--format", "raw", &format!("vm={file}")]),
        };
        let server = Server::ours(&["--format", "raw", upstream.uri()]);
        let do_it = |command: &str| peer(&qemu_io, &["-f", "raw", "-c", command, server.uri()]);
        do_it("write -P 7 1M 1M");
        do_it("write -P 8 -f 4000001 999");
        do_it("flush");
        let content = std::fs::read(&file).expect("the disk");
        assert!(content[1 << 20..2 << 20].iter().all(|byte| *byte == 7));
        assert!(content[4_000_001..4_001_000].iter().all(|byte| *byte == 8));
        for command in ["read -P 7 1M 1M", "read -P 8 4000001 999", "read -P 0 2M 1M"] {
            assert!(!do_it(command).contains("failed"), "{command}");
        }
        assert_eq!(map(server.uri(), "base:allocation"), map(upstream.uri(), "base:allocation"));
        let before = allocated(&file);
        do_it("discard 1M 512k");
        assert!(allocated(&file) <= before - (512 << 10), "a discard is handed on");
        do_it("write -z -u 1536k 512k");
        assert!(allocated(&file) <= before - (1 << 20), "and so are zeroes");
        server.end();
        upstream.end();
    }
}

#[test]
fn the_contexts_of_the_other_server_are_handed_on() {
    tools!(qemu_io = "qemu-io", qemu_nbd = "qemu-nbd", qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let top = image::chain(&disk, &qemu_img, &qemu_io);
    peer(&qemu_img, &["bitmap", "--add", &top, "daily"]);
    image::write(&qemu_io, &top, "write -P 3 640k 64k");
    let upstream =
        Server::qemu_nbd(&qemu_nbd, "vm", &["-r", "-A", "-B", "daily", "-f", "qcow2", &top]);
    let server =
        Server::ours(&["--read-only", "--format=raw", "-A", "-B", "daily", upstream.uri()]);
    for context in ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:daily"] {
        assert_eq!(map(server.uri(), context), map(upstream.uri(), context), "{context}");
    }
    // Their server takes eight connections at a time.
    drop(server);
    let all = Server::ours(&["--read-only", "--format=raw", "-B", "all", upstream.uri()]);
    let listed = nbd_cli(&["list-meta", all.uri()]).success();
    assert_eq!(listed, "base:allocation\nqemu:dirty-bitmap:daily\n");
    drop(all);
    let none = ["serve", "--read-only", "-f", "raw", "-B", "nosuch", upstream.uri()];
    says(nbd_cli(&none), &["does not offer the bitmap 'nosuch'"]);
    // What the other server has not is not offered.
    let plain = Server::qemu_nbd(&qemu_nbd, "vm", &["-r", "-f", "qcow2", &top]);
    let server = Server::ours(&["--read-only", "--format", "raw", "-A", plain.uri()]);
    assert_eq!(nbd_cli(&["list-meta", server.uri()]).success(), "base:allocation\n");
}

#[test]
fn an_image_on_the_other_server_is_served_as_the_disk_in_it() {
    tools!(qemu_io = "qemu-io", qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("disk.qcow2");
    peer(&qemu_img, &["convert", "-f", "raw", "-O", "qcow2", disk.path(), &image]);
    let upstream = Server::ours(&["--read-only", "--format", "raw", &image]);
    let server = Server::ours(&["--temporary", &format!("inner={}", upstream.uri())]);
    let copy = disk.beside("copy.img");
    nbd_cli(&["copy", &server.uri_of("inner"), &copy]).success();
    disk.assert_equals(&copy);
    peer(&qemu_io, &["-f", "raw", "-c", "write -P 9 0 64k", &server.uri_of("inner")]);
    image::are_equal(&qemu_img, disk.path(), &image);
    let refused = nbd_cli(&["serve", "--format", "qcow2", upstream.uri()]);
    says(refused, &["exported read-only", "--read-only"]);
}

#[test]
fn a_lost_server_is_connected_to_again() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let socket = disk.beside("upstream");
    let start = || {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--format", "raw", "--socket", &socket, disk.path()]);
        Server::start(&mut command, socket.clone().into())
    };
    let upstream = start();
    let server = Server::ours(&["--format", "raw", upstream.uri()]);
    let read = || peer(&qemu_io, &["-f", "raw", "-c", "read 0 64k", server.uri()]);
    assert!(!read().contains("failed"));
    // Killed: the socket's file stays behind.
    drop(upstream);
    let upstream = start();
    assert!(!read().contains("failed"));
    upstream.end();
    let none = Server::ours(&["memory:1M"]);
    let server = Server::ours(&["--source-reconnect", "0", none.uri()]);
    none.end();
    let uri = server.uri();
    let refused =
        crate::support::run(Command::new(qemu_io).args(["-f", "raw", "-c", "read 0 4k", uri]));
    assert!(format!("{refused:?}").contains("Input/output error"), "{refused:?}");
}

#[test]
fn a_lost_server_in_a_description_is_connected_to_again() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (socket, overlay) = (disk.beside("upstream"), disk.beside("overlay.qcow2"));
    let start = || {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--format", "raw", "--socket", &socket, disk.path()]);
        Server::start(&mut command, socket.clone().into())
    };
    nbd_cli(&["image", "create", "-f", "qcow2", &overlay, "8M"]).success();
    let nbd = format!(r#"{{"driver":"nbd","server":{{"type":"unix","path":"{socket}"}}}}"#);
    let layer = format!(r#"{{"driver":"raw","file":{nbd}}}"#);
    let file = format!(r#"{{"driver":"file","filename":"{overlay}"}}"#);
    for source in [
        layer.clone(),
        format!(r#"{{"driver":"raw","size":65536,"file":{nbd}}}"#),
        format!(r#"{{"driver":"qcow2","file":{file},"backing":{layer}}}"#),
    ] {
        let upstream = start();
        let server = Server::ours(&[&format!("json:{source}")]);
        let read = || peer(&qemu_io, &["-f", "raw", "-c", "read 0 64k", server.uri()]);
        assert!(!read().contains("failed"), "{source}");
        drop(upstream);
        let upstream = start();
        assert!(!read().contains("failed"), "{source}");
        server.end();
        upstream.end();
    }
}

#[test]
fn the_other_server_may_want_tls() {
    let Some(certificates) = Certificates::any() else { return };
    let good = certificates.good();
    let directory = good.to_str().expect("a plain name");
    let upstream =
        Server::ours(&["--tls", "require", "--tls-certificates", directory, "memory:1M"]);
    // Without the certificates that the server writes behind it.
    let uri = format!("nbds+unix:///?socket={}", upstream.socket().display());
    let options = ["--source-tls-certificates", directory, "--source-tls-hostname", "localhost"];
    // The server in front has none.
    let server = Server::ours(&[&options[..], &[&uri]].concat());
    assert_eq!(nbd_cli(&["info", "--size", server.uri()]).success(), "1048576\n");
    let environment = [("HOME", "/nonexistent")];
    let stranger = Command::new(PROGRAM).args(["serve", &uri]).envs(environment).output();
    let stranger = stranger.expect("a program");
    assert_eq!(stranger.status.code(), Some(1), "{stranger:?}");
    let plain = uri.replacen("nbds+", "nbd+", 1);
    let useless = nbd_cli(&[&["serve"], &options[..], &[&plain]].concat());
    says(useless, &["--source-tls-certificates is given", "nbds"]);
    let useless = nbd_cli(&[&["serve"], &options[..], &["memory:1M"]].concat());
    says(useless, &["--source-tls-certificates is given", "no source is an NBD URI"]);
}
