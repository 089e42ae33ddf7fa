//! Sources of `serve` that are described by the options of QEMU's block drivers.

use std::process::Command;

use crate::support::{Disk, PROGRAM, Server, nbd_cli, peer, says};
use crate::tools;

fn size(source: &str, more: &[&str]) -> crate::support::Outcome {
    let size = format!("{PROGRAM} info --size \"$uri\"");
    nbd_cli(&[&["serve"], more, &["--run", &size, source]].concat())
}

#[test]
fn a_described_disk_is_served_as_qemu_nbd_serves_it() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let [image, raw] = ["image.qcow2", "raw=1.img"].map(|name| disk.beside(name));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "4M"]);
    std::fs::write(&raw, vec![7; 5000]).expect("a file");
    let file = |path: &str| format!(r#"{{"driver":"file","filename":"{path}"}}"#);
    let of_image = format!(r#"json:{{"driver":"qcow2","file":{}}}"#, file(&image));
    for (source, expected) in [
        (of_image.clone(), "4194304\n"),
        (format!("vm={of_image}"), "4194304\n"),
        (format!(r#"json:{{"file":{}}}"#, file(&image)), "4194304\n"),
        (format!("json:{}", file(&raw)), "5000\n"),
        (
            format!(r#"json:{{"driver":"raw","offset":512,"size":1024,"file":{}}}"#, file(&raw)),
            "1024\n",
        ),
        (
            format!(r#"json:{{"driver":"qcow2","backing":null,"file":{}}}"#, file(&image)),
            "4194304\n",
        ),
        (r#"json:{"driver":"null-co","size":4096}"#.to_owned(), "4096\n"),
    ] {
        assert_eq!(size(&source, &[]).success(), expected, "{source}");
    }
    // An export of another server, too, with its options.
    let server = Server::ours(&[&raw]);
    let socket = server.socket().display();
    let far = format!(r#"json:{{"driver":"nbd","server":{{"type":"unix","path":"{socket}"}}}}"#);
    assert_eq!(size(&far, &["--read-only", "--source-timeout", "60s"]).success(), "5000\n");
    server.end();

    for (source, more, parts) in [
        (of_image, &["--format", "raw"][..], &["it is a qcow2 image", "says raw"][..]),
        (r#"json:{"driver":"ssh"}"#.to_owned(), &[], &["'ssh'"]),
        (r#"json:{"driver":"file","filename":"a","more":1}"#.to_owned(), &[], &["'more'"]),
        ("json:{".to_owned(), &[], &["not valid JSON"]),
    ] {
        says(size(&source, more), parts);
    }
}

#[test]
fn what_a_description_says_of_writing_and_locking_is_honoured() {
    let disk = Disk::sparse();
    let raw = disk.beside("raw.img");
    std::fs::write(&raw, vec![7; 1 << 20]).expect("a file");
    let described = |more: &str| format!(r#"json:{{"driver":"file","filename":"{raw}"{more}}}"#);
    let is = |what: &str| format!("{PROGRAM} info --is {what} \"$uri\"");
    let read_only = described(r#","read-only":true"#);
    nbd_cli(&["serve", "--run", &is("read-only"), &read_only]).success();
    let writable = described("");
    let outcome = nbd_cli(&["serve", "--run", &is("read-only"), &writable]);
    assert_ne!(outcome.code, Some(0), "{outcome:?}");

    let place = tempfile::tempdir().expect("a directory");
    let path = |name: &str| place.path().join(name).display().to_string();
    let (socket, control) = (path("socket"), path("control"));
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--socket", &socket, "--control", &control, &writable]);
    let server = Server::start(&mut command, socket.into());
    says(size(&writable, &[]), &["raw.img"]);
    assert_eq!(size(&described(r#","locking":"off""#), &[]).success(), "1048576\n");
    let shared = described(r#","force-share":true"#);
    says(size(&shared, &[]), &["force-share=on", "only read"]);
    for more in ["--read-only", "--temporary"] {
        assert_eq!(size(&shared, &[more]).success(), "1048576\n");
        assert_eq!(size(&writable, &["--force-share", more]).success(), "1048576\n");
    }
    let shared = described(r#","read-only":true,"force-share":true"#);
    assert_eq!(size(&shared, &[]).success(), "1048576\n");
    nbd_cli(&["control", &control, "add-export", "again", &shared]).success();
    assert_eq!(nbd_cli(&["info", "--size", &server.uri_of("again")]).success(), "1048576\n");
    server.end();
}
