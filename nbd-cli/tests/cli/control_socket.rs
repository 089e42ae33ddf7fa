//! The control socket: requests, and invalid input.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::support::{Disk, Server, nbd_cli, says};

#[test]
fn exports_come_and_go() {
    let directory = Disk::sparse();
    let control = directory.beside("control");
    let server = Server::ours(&["--control", &control, "a=memory:1M"]);
    let say = |arguments: &[&str]| nbd_cli(&[&["control", &control][..], arguments].concat());
    let mode = std::fs::metadata(&control).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let uris = say(&["add-export", "disk", directory.path(), "--read-only"]).success();
    let copied = directory.beside("copy.img");
    nbd_cli(&["copy", uris.trim(), &copied]).success();
    directory.assert_equals(&copied);
    let listing = say(&["list"]).success();
    assert!(listing.contains("'disk'") && listing.contains("read-only"), "{listing}");
    says(say(&["add-export", "disk", "memory:1M"]), &["already"]);
    says(say(&["add-export", "x", &directory.beside("nothing")]), &["nothing"]);
    says(say(&["bitmap-add", "disk", "b"]), &["read-only"]);
    says(say(&["bitmap-add", "a", "b"]), &["not an image"]);
    say(&["remove-export", "disk"]).success();
    says(nbd_cli(&["info", &server.uri_of("disk")]), &["no export named 'disk'"]);
    says(say(&["remove-export", "disk"]), &["no disk exported as 'disk'"]);
    let elsewhere = Server::ours(&["--read-only", directory.path()]);
    for source in [&format!("file:{}", directory.path()), elsewhere.uri()] {
        say(&["add-export", "again", source, "--read-only"]).success();
        nbd_cli(&["image", "compare", &server.uri_of("again"), directory.path()]).success();
        say(&["remove-export", "again"]).success();
    }

    let mut server = server;
    say(&["shutdown"]).success();
    assert!(server.wait().success());
    assert!(!std::path::Path::new(&control).exists());
    says(say(&["list"]), &["--control"]);
}

#[test]
fn a_file_has_one_writer_in_a_server_even_with_locking_off() {
    let directory = Disk::sparse();
    let control = directory.beside("control");
    let _server = Server::ours(&["--locking", "off", "--control", &control, directory.path()]);
    let say = |arguments: &[&str]| nbd_cli(&[&["control", &control][..], arguments].concat());
    says(say(&["add-export", "again", directory.path()]), &["this process", "close it first"]);
    say(&["add-export", "again", directory.path(), "--read-only"]).success();
}

#[test]
fn what_is_added_to_a_temporary_server_is_temporary_too() {
    let directory = Disk::sparse();
    let control = directory.beside("control");
    let before = std::fs::read(directory.path()).expect("an image");
    let server = Server::ours(&["--temporary", "--control", &control, directory.path()]);
    let say = |arguments: &[&str]| nbd_cli(&[&["control", &control][..], arguments].concat());
    say(&["add-export", "again", directory.path()]).success();
    say(&["add-export", "memory", "memory:1M"]).success();
    let written = directory.beside("written");
    std::fs::write(&written, vec![7; before.len()]).expect("a file");
    nbd_cli(&["copy", &written, &server.uri_of("again")]).success();
    nbd_cli(&["image", "compare", &server.uri_of("again"), &written]).success();
    assert!(std::fs::read(directory.path()).expect("an image") == before);
    // Its data would be lost.
    let successor = nbd_cli(&["serve", "--temporary", "--takeover", &control, directory.path()]);
    says(successor, &["in memory or temporary"]);
    say(&["remove-export", "again"]).success();
    server.end();
    assert!(std::fs::read(directory.path()).expect("an image") == before);
}

#[test]
fn what_is_added_to_a_read_only_server_is_read_only_too_and_no_request_changes_it() {
    let directory = Disk::sparse();
    let (control, image) = (directory.beside("control"), directory.beside("disk.qcow2"));
    nbd_cli(&["image", "convert", "-O", "qcow2", directory.path(), &image]).success();
    nbd_cli(&["bitmap", "add", &image, "daily"]).success();
    let before = std::fs::read(&image).expect("an image");
    let server = Server::ours(&["--read-only", "--control", &control, directory.path()]);
    let say = |arguments: &[&str]| nbd_cli(&[&["control", &control][..], arguments].concat());
    say(&["add-export", "added", &image]).success();
    say(&["add-export", "memory", "memory:1M"]).success();
    for name in ["", "added", "memory"] {
        nbd_cli(&["info", "--is", "read-only", &server.uri_of(name)]).success();
    }
    // As by another reader: the image is not locked for writing.
    let elsewhere = Server::ours(&["--read-only", &image]);
    for refused in [
        &["bitmap-add", "added", "b"][..],
        &["bitmap-remove", "added", "daily"],
        &["bitmap-clear", "added", "daily"],
        &["bitmap-disable", "added", "daily"],
        &["checkpoint-start", "added", "--bitmap", "daily"],
        &["stream", "added"],
    ] {
        says(say(refused), &["read-only"]);
    }
    says(nbd_cli(&["image", "resize", &image, "16M"]), &["another program"]);
    // A view of a moment changes nothing.
    say(&["checkpoint-start", "added"]).success();
    say(&["checkpoint-end", "added", "success"]).success();
    let listing = say(&["list"]).success();
    assert!(listing.contains("daily"), "{listing}");
    server.end();
    elsewhere.end();
    assert!(std::fs::read(&image).expect("an image") == before);
}

#[test]
fn nonsense_is_answered_or_ends_the_conversation() {
    let directory = Disk::sparse();
    let control = directory.beside("control");
    let server = Server::ours(&["--control", &control, directory.path()]);
    let mut stream = UnixStream::connect(&control).expect("it listens");
    let mut replies = BufReader::new(stream.try_clone().expect("a descriptor"));
    let mut ask = |line: &[u8]| -> Value {
        stream.write_all(line).and_then(|()| stream.write_all(b"\n")).expect("it is read");
        let mut reply = String::new();
        replies.read_line(&mut reply).expect("a reply");
        serde_json::from_str(&reply).expect("JSON")
    };
    let nested = "[".repeat(50_000);
    for line in [
        &b"nonsense"[..],
        b"\0\xff\xfe",
        b"{}",
        b"{\"command\":\"reboot\"}",
        b"{\"command\":\"list\",\"command\":\"list\"}",
        br#"{"command":"add-export","name":"x","source":"memory:99999999999999999999"}"#,
        br#"{"command":"add-export","name":"x","source":"","format":"dmg"}"#,
        nested.as_bytes(),
    ] {
        let reply = ask(line);
        assert!(reply["error"]["message"].is_string(), "{reply}");
    }
    let long_name =
        json!({"command": "add-export", "name": "n".repeat(5000), "source": "memory:1M"});
    let reply = ask(long_name.to_string().as_bytes());
    assert_eq!(reply["error"]["kind"], "invalid-request", "{reply}");
    assert_eq!(ask(br#"{"command":"list"}"#)["result"]["exports"][0]["name"], "");

    // A line without an end costs the server nothing.
    let mut endless = UnixStream::connect(&control).expect("it listens");
    let part = [b'x'; 65536];
    let mut sent = 0;
    while sent < 64 << 20 {
        match endless.write(&part) {
            Ok(count) => sent += count,
            Err(_) => break,
        }
    }
    assert!(sent < 8 << 20, "it is not read for ever");
    let mut reply = String::new();
    let _ = endless.read_to_string(&mut reply);
    assert!(ask(br#"{"command":"list"}"#)["result"].is_object());
    server.end();
}

#[test]
fn clients_that_say_nothing_keep_nobody_from_the_control_socket() {
    let directory = Disk::sparse();
    let control = directory.beside("control");
    let server = Server::ours(&["--control", &control, "a=memory:1M"]);
    // Half of them have asked for more than they take.
    let silent: Vec<_> = (0..200)
        .map(|index| {
            let mut stream = UnixStream::connect(&control).expect("it listens");
            if index % 2 == 0 {
                stream.set_nonblocking(true).expect("a socket");
                let flood = b"{\"command\":\"list\"}\n".repeat(1000);
                while stream.write(&flood).is_ok() {}
            }
            stream
        })
        .collect();
    for _ in 0..3 {
        let listing = nbd_cli(&["control", &control, "list"]).success();
        assert!(listing.contains("'a'"), "{listing}");
    }
    drop(silent);
    server.end();
}

#[test]
fn the_list_says_what_clients_have_done() {
    let directory = Disk::sparse();
    let control = directory.beside("control");
    let server = Server::ours(&["--control", &control, "a=memory:1M", "b=memory:1M"]);
    let uri = server.uri_of("a");
    let load = ["bench", "-w", "write", "--destroy-data", "--requests", "256", "-b", "4K", &uri];
    nbd_cli(&load).success();
    let client = UnixStream::connect(server.socket()).expect("it listens");
    let listing = nbd_cli(&["control", &control, "list"]).success();
    assert!(
        listing.contains("requests: 256, errors: 0, 0 bytes read, 1.0 MiB written"),
        "{listing}"
    );
    assert!(listing.contains("requests: 0, errors: 0"), "{listing}");
    assert!(listing.contains("The server has run for "), "{listing}");
    let json = nbd_cli(&["control", "--json", &control, "list"]).success();
    let json: Value = serde_json::from_str(&json).expect("JSON");
    let traffic = &json["exports"][0]["traffic"];
    assert_eq!(traffic["bytes-written"], 1 << 20, "{json}");
    assert!(json["exports"][0]["since"].as_u64() >= json["since"].as_u64().map(|at| at - 5));
    drop(client);

    // One that stays.
    let mut busy = std::process::Command::new(crate::support::PROGRAM);
    let arguments = ["bench", "--rate", "100", "--duration", "60s", &uri];
    let mut busy = busy.args(arguments).stdout(std::process::Stdio::null()).spawn().expect("bench");
    let address = format!("process {}, user ", busy.id());
    crate::support::qemu_nbd::wait_until("its client is listed", || {
        nbd_cli(&["control", &control, "list"]).success().contains(&address)
    });
    busy.kill().expect("it runs");
    busy.wait().expect("a child");
    server.end();
}

#[test]
fn exports_that_are_added_are_hidden_like_those_of_the_start() {
    let directory = Disk::sparse();
    let control = directory.beside("control");
    let server = Server::ours(&["--hidden", "--control", &control, "memory:1M"]);
    nbd_cli(&["control", &control, "add-export", "added", "memory:1M"]).success();
    nbd_cli(&["info", "--size", &server.uri_of("added")]).success();
    let listed = nbd_cli(&["info", "--list", "--json", &server.uri_of("")]).success();
    assert!(!listed.contains("\"added\""), "{listed}");
    server.end();
}
