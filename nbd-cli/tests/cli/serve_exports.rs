//! Several exports, names and addresses, and their announcement.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use crate::support::{Disk, PROGRAM, Server, nbd_cli};

#[test]
fn one_uri_per_export_and_address_is_printed() {
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let mut child = Command::new(PROGRAM)
        .args(["serve", "--listen=127.0.0.1:0", "--socket", &socket])
        .args(["a b=memory:1M", "c=memory:2M"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("nbd-cli");
    let lines = BufReader::new(child.stdout.take().expect("its output")).lines().take(4);
    let lines: Vec<_> = lines.map(|line| line.expect("text")).collect();
    let sizes = lines.iter().map(|uri| nbd_cli(&["info", "--size", uri]).success());
    let sizes: Vec<_> = sizes.collect();
    child.kill().and_then(|()| child.wait()).expect("its end");
    assert!(lines[0].starts_with("nbd://127.0.0.1:"), "{lines:?}");
    assert!(lines[0].ends_with("/a%20b"), "{lines:?}");
    assert_eq!(lines[2], format!("nbd+unix:///a%20b?socket={socket}"));
    assert_eq!(sizes, ["1048576\n", "2097152\n", "1048576\n", "2097152\n"]);
}

#[test]
fn the_first_source_is_the_default_export() {
    let server = Server::ours(&["a=memory:1M", "b=memory:2M"]);
    assert_eq!(nbd_cli(&["info", "--size", &server.uri_of("")]).success(), "1048576\n");
}

#[test]
fn ipv6_is_served() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        eprintln!("skipped: this machine has no IPv6 loopback address");
        return;
    }
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--listen", "[::1]:0", "memory:1M"]);
    let server = Server::start(&mut command, "unused".into());
    assert!(server.uri().starts_with("nbd://[::1]:"), "{}", server.uri());
    assert_eq!(nbd_cli(&["info", "--size", server.uri()]).success(), "1048576\n");
}

#[test]
fn a_public_address_gets_a_warning_and_loopback_none() {
    for (address, warned) in [("0.0.0.0:0", true), ("127.0.0.1:0", false)] {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--run", "true", "--listen", address, "memory:1M"]);
        let output = command.output().expect("nbd-cli");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.contains("warning") && said.contains("no encryption"), warned, "{said}");
    }
}
