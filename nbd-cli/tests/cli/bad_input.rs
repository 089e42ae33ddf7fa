//! Bad input gives one clear sentence and exit code 1, and leaves no files.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use crate::support::{Disk, Outcome, PROGRAM, Server, nbd_cli, run, says};

/// Serves what must not work; `timeout` ends it if it works.
fn serve(arguments: &[&str]) -> Outcome {
    run(Command::new("timeout").args(["20", PROGRAM, "serve"]).args(arguments))
}

#[test]
fn a_missing_file_is_named() {
    let disk = Disk::sparse();
    let (missing, socket) = (disk.beside("missing.img"), disk.beside("socket"));
    says(serve(&["--socket", &socket, &missing]), &[&missing, "no such file"]);
    assert!(!Path::new(&socket).exists(), "no socket is left behind");
    says(nbd_cli(&["copy", &missing, &disk.beside("copy")]), &[&missing, "no such file"]);
    assert!(!Path::new(&disk.beside("copy")).exists(), "no copy is left behind");
}

#[test]
fn a_directory_is_no_image() {
    let disk = Disk::sparse();
    let directory = disk.beside("");
    says(serve(&["--socket", &disk.beside("s"), &directory]), &[&directory, "directory"]);
    says(nbd_cli(&["copy", &directory, "null:"]), &[&directory, "directory"]);
    says(nbd_cli(&["copy", disk.path(), &directory]), &[&directory, "directory"]);
}

#[test]
fn a_busy_port_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let outcome = serve(&["--listen", &address, "memory:1M"]);
    says(outcome, &["cannot listen on", &address, "another"]);
}

#[test]
fn a_live_socket_is_not_taken_and_a_stale_one_is_replaced() {
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let listener = UnixListener::bind(&socket).expect("a socket");
    says(serve(&["--socket", &socket, "memory:1M"]), &["cannot listen on", &socket]);
    assert!(Path::new(&socket).exists(), "it belongs to somebody else");
    drop(listener);
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--socket", &socket, "memory:1M"]);
    let server = Server::start(&mut command, (&socket).into());
    assert_eq!(nbd_cli(&["info", "--size", server.uri()]).success(), "1048576\n");
    server.end();
}

#[test]
fn a_file_in_the_place_of_the_socket_stays() {
    let disk = Disk::sparse();
    says(serve(&["--socket", disk.path(), "memory:1M"]), &["cannot listen on", disk.path()]);
    disk.assert_equals(disk.path());
}

#[test]
fn missing_permission_is_explained() {
    if rustix::process::geteuid().is_root() {
        eprintln!("skipped: root may open everything");
        return;
    }
    let disk = Disk::sparse();
    let set = |mode| std::fs::set_permissions(disk.path(), PermissionsExt::from_mode(mode));
    set(0o444).expect("our own file");
    let outcome = serve(&["--socket", &disk.beside("s"), disk.path()]);
    says(outcome, &[disk.path(), "permission denied", "--read-only"]);
}

#[test]
fn malformed_uris_are_refused() {
    for uri in ["nbd:", "http://localhost/", "nbd+unix:///x", "nbd://localhost:99999/", "disk.img"]
    {
        let outcome = nbd_cli(&["info", uri]);
        assert_eq!(outcome.code, Some(1), "{uri}: {outcome:?}");
        assert!(outcome.stderr.contains("[URI]"), "{uri}: {outcome:?}");
    }
    let outcome = nbd_cli(&["copy", "nbd+unix:///x", "null:"]);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.stderr.contains("socket"), "{outcome:?}");
}

#[test]
fn an_unknown_export_is_reported_with_those_that_exist() {
    let server = Server::ours(&["one=memory:1M", "two=memory:1M"]);
    let wrong = server.uri_of("three");
    for command in ["info", "map", "list-meta"] {
        says(nbd_cli(&[command, &wrong]), &["three"]);
    }
    says(nbd_cli(&["info", &wrong]), &["no export named 'three'", "'one', 'two'"]);
    says(nbd_cli(&["copy", &wrong, "null:"]), &["no export named 'three'", "'one', 'two'"]);
}

#[test]
fn an_unknown_size_suffix_is_named() {
    let outcome = serve(&["memory:1Q"]);
    says(outcome, &["memory:1Q", "unknown size suffix 'Q'", "K, M, G"]);
    let outcome = nbd_cli(&["copy", "--request-size", "1Q", "null:", "null:"]);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.stderr.contains("unknown size suffix 'Q'"), "{outcome:?}");
}

#[test]
fn nobody_there_is_said_so() {
    let disk = Disk::sparse();
    let uri = format!("nbd+unix:///?socket={}", disk.beside("nobody"));
    says(nbd_cli(&["info", &uri]), &[&uri, "no such socket"]);
    // A port that was free a moment ago.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let uri = format!("nbd://{}/", listener.local_addr().expect("an address"));
    drop(listener);
    says(nbd_cli(&["copy", &uri, &disk.beside("copy")]), &[&uri, "is the server running"]);
    assert!(!Path::new(&disk.beside("copy")).exists(), "no copy is left behind");
}

#[test]
fn a_command_for_images_without_its_group_is_named_in_full() {
    let disk = Disk::sparse();
    let copy = disk.beside("copy");
    says(nbd_cli(&["convert", disk.path(), &copy]), &["'nbd-cli image convert'"]);
    assert!(nbd_cli(&["konvert", disk.path(), &copy]).stderr.contains("unrecognized subcommand"));
    assert!(!Path::new(&copy).exists());
}

#[test]
fn names_that_contradict_each_other_are_refused() {
    says(serve(&["memory:1M", "memory:2M"]), &["NAME=SOURCE"]);
    says(serve(&["a=memory:1M", "a=memory:2M"]), &["already an export named \"a\""]);
    says(serve(&["--name", "x", "a=memory:1M"]), &["--name"]);
    says(serve(&["--description", "x", "a=memory:1M", "b=memory:1M"]), &["--description"]);
}

#[test]
fn numbers_out_of_range_are_refused() {
    says(serve(&["--max-connections", "0", "memory:1M"]), &["--max-connections", "at least 1"]);
    for (option, value) in [("--request-size", "1000"), ("--request-size", "64M"), ("-S", "100")] {
        let outcome = nbd_cli(&["copy", option, value, "null:", "null:"]);
        assert_eq!(outcome.code, Some(1), "{option} {value}: {outcome:?}");
    }
    let timeouts = ["0", "25h", "-1"].map(|text| format!("--handshake-timeout={text}"));
    for option in
        timeouts.iter().map(String::as_str).chain(["--busy-poll=2ms", "--poll-max-ns=1000001"])
    {
        let outcome = serve(&[option, "memory:1M"]);
        assert_eq!(outcome.code, Some(1), "{option}: {outcome:?}");
    }
}
