//! The qemu-nbd form with exports of other servers.

use crate::support::qemu_nbd::{Daemon, Foreground, ours, qemu_nbd};
use crate::support::{Disk, Server, peer};
use crate::tools;

#[test]
fn an_export_of_another_server_is_served_again() {
    tools!(theirs = "qemu-nbd", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let below = Server::qemu_nbd(&theirs, "lower", &["-f", "raw", disk.path()]);
    let socket = below.socket().display().to_string();
    let uri = below.uri().to_owned();
    for (byte, arguments) in [
        (1_u8, vec!["-f", "raw", &uri]),
        (2, vec!["-f", "raw", &format!("nbd:unix:{socket}:exportname=lower")]),
        (
            3,
            vec![
                "--image-opts",
                &format!("driver=nbd,server.type=unix,server.path={socket},export=lower"),
            ],
        ),
        (
            4,
            vec![&format!(
                "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"nbd\",\"path\":\"{socket}\",\
             \"export\":\"lower\"}}}}"
            )],
        ),
    ] {
        let mut server = Foreground::start(ours(), &arguments);
        let write = format!("write -P {byte} 3M 100k");
        let read = format!("read -P {byte} 3M 100k");
        let said = peer(&qemu_io, &["-f", "raw", "-c", &write, "-c", &read, &server.uri("")]);
        assert!(!said.contains("failed"), "{arguments:?}: {said}");
        assert_eq!(server.exit_code(), Some(0), "{}", server.complaints());
        let content = std::fs::read(disk.path()).expect("the disk");
        assert!(content[3 << 20..][..100 << 10].iter().all(|found| *found == byte));
    }
}

#[test]
fn a_backing_file_may_be_an_export() {
    tools!(theirs = "qemu-nbd", qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let below = Server::qemu_nbd(&theirs, "lower", &["-r", "-f", "raw", disk.path()]);
    let overlay = disk.beside("overlay.qcow2");
    let create = ["create", "-q", "-u", "-f", "qcow2", "-b", below.uri(), "-F", "raw"];
    peer(&qemu_img, &[&create[..], &[&overlay, "8M"]].concat());
    for arguments in [&["-t", "-f", "qcow2"][..], &["-t", "-s"]] {
        let (daemon, started) = Daemon::start(&[arguments, &[&overlay]].concat());
        started.success();
        let commands = ["-c", "write -P 9 10k 1k", "-c", "read -P 9 10k 1k"];
        let said = peer(&qemu_io, &[&["-f", "raw"], &commands[..], &[&daemon.uri()]].concat());
        assert!(!said.contains("failed"), "{said}");
        let copy = disk.beside("copy.img");
        peer(&qemu_img, &["convert", "-O", "raw", &daemon.uri(), &copy]);
        let mut expected = disk.content().to_vec();
        expected[10 << 10..][..1 << 10].fill(9);
        assert!(std::fs::read(&copy).expect("the copy") == expected, "{arguments:?}");
    }
}

#[test]
fn a_server_that_is_not_there_or_does_not_allow_it_is_named() {
    tools!(theirs = "qemu-nbd");
    let disk = Disk::sparse();
    let below = Server::qemu_nbd(&theirs, "lower", &["-r", "-f", "raw", disk.path()]);
    let uri = below.uri();
    for (arguments, part) in [
        (&["nbd+unix:///x?socket=/nonexistent/socket"][..], "/nonexistent/socket"),
        (&["-f", "raw", uri], "read-only"),
        (&["-f", "raw", "-r", &below.uri_of("other")], "other"),
        (&["-l", "1", uri], "a raw image has none"),
        (&["nbd:localhost"], "port"),
        (&["http://localhost/disk"], "http"),
    ] {
        let socket = disk.beside("socket");
        let refused = qemu_nbd(&[&["-k", &socket], arguments].concat());
        assert_eq!(refused.code, Some(1), "{arguments:?}: {refused:?}");
        assert!(refused.stderr.contains(part), "{part} is missing in: {refused:?}");
    }
}
