//! `--timeout`: a hanging server ends the command.

use std::os::unix::net::UnixListener;

use crate::support::{Disk, Server, nbd_cli, says};
use crate::tools;

#[test]
fn a_server_that_hangs_ends_the_copy_in_words() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let slow = ["--filter=delay", "pattern", "8M", "rdelay=3600"];
    let server = Server::nbdkit(&nbdkit, &slow);
    let copy = disk.beside("copy.img");
    let limits = ["--timeout", "300ms", "--reconnect", "100ms"];
    let said = nbd_cli(&[&["copy"], &limits[..], &[server.uri(), &copy]].concat());
    says(said, &["did not answer", "within 0.3 s", "is incomplete"]);
    // nbdkit may abort when a client leaves it in the middle of a request.
    let server = Server::nbdkit(&nbdkit, &slow);
    let target = disk.beside("backup.qcow2");
    let arguments = ["backup", "--timeout", "300ms", "--reconnect", "100ms", server.uri(), &target];
    says(nbd_cli(&arguments), &["did not answer", "within 0.3 s"]);
}

#[test]
fn a_server_that_answers_in_time_is_not_given_up() {
    tools!(nbdkit = "nbdkit");
    let disk = Disk::sparse();
    let file = format!("file={}", disk.path());
    let server = Server::nbdkit(&nbdkit, &["--filter=delay", "file", &file, "rdelay=20ms"]);
    let copy = disk.beside("copy.img");
    nbd_cli(&["copy", "--timeout", "20s", server.uri(), &copy]).success();
    disk.assert_equals(copy);
}

#[test]
fn a_server_that_says_nothing_ends_every_command() {
    let directory = Disk::sparse();
    let silent = directory.beside("silent");
    let _listener = UnixListener::bind(&silent).expect("a socket");
    let uri = format!("nbd+unix:///?socket={silent}");
    for command in [
        &["info"][..],
        &["list-meta"],
        &["map"],
        &["image", "info"],
        &["image", "map"],
        &["image", "measure"],
        &["copy", "--reconnect", "10ms"],
        &["backup"],
        &["image", "convert"],
    ] {
        let is_copy = ["copy", "backup", "convert"].iter().any(|word| command.contains(word));
        let target = directory.beside("target");
        let target: &[&str] = if is_copy { &[&target] } else { &[] };
        let said = nbd_cli(&[command, &["--timeout", "200ms", &uri], target].concat());
        says(said, &[&silent, "within 0.2 s"]);
    }
    for command in [&["copy"][..], &["restore", "-f", "raw"], &["image", "convert"]] {
        let said = nbd_cli(&[command, &["--timeout", "200ms", directory.path(), &uri]].concat());
        says(said, &[&silent, "within 0.2 s"]);
    }
    let compared = nbd_cli(&["image", "compare", "--timeout", "200ms", directory.path(), &uri]);
    assert_eq!(compared.code, Some(2), "an error, no difference: {compared:?}");
}

#[test]
fn a_server_that_hangs_later_ends_them_as_well() {
    tools!(nbdkit = "nbdkit");
    let slow = ["--filter=delay", "memory", "8M", "rdelay=3600", "delay-extents=3600"];
    let disk = Disk::sparse();
    let late = ["did not answer", "within 0.2 s"];
    for command in [&["map"][..], &["image", "map"]] {
        // nbdkit may abort when a client leaves it in the middle of a request.
        let server = Server::nbdkit(&nbdkit, &slow);
        says(nbd_cli(&[command, &["--timeout", "200ms", server.uri()]].concat()), &late);
    }
    let server = Server::nbdkit(&nbdkit, &slow);
    let compared = nbd_cli(&["image", "compare", "--timeout", "200ms", server.uri(), disk.path()]);
    assert_eq!(compared.code, Some(2), "{compared:?}");
    assert!(late.iter().all(|words| compared.stderr.contains(words)), "{compared:?}");
    let server = Server::nbdkit(&nbdkit, &slow);
    let info = nbd_cli(&["info", "--timeout", "200ms", server.uri()]).success();
    assert!(info.contains("8388608"), "what is known is said: {info}");
}

#[test]
fn a_limit_that_concerns_nothing_is_refused() {
    let disk = Disk::sparse();
    says(nbd_cli(&["image", "map", "--timeout", "1s", disk.path()]), &["--timeout", "URI"]);
}

#[test]
fn a_control_socket_that_says_nothing_ends_every_client_in_words() {
    let disk = Disk::sparse();
    let silent = disk.beside("control");
    let _listener = UnixListener::bind(&silent).expect("a socket");
    let target = disk.beside("target");
    for command in [
        &["control", &silent, "list"][..],
        &["control", &silent, "bitmap-add", "vm", "daily"],
        &["control", &silent, "checkpoint-start", "vm"],
        &["top", "--once", &silent],
        &["top", "--json", &silent],
        &["backup", "--control", &silent, "--export", "vm", &target],
    ] {
        let said = nbd_cli(&[command, &["--timeout", "200ms"]].concat());
        says(said, &[&silent, "has not answered for 0.2 s"]);
    }
    let address = format!("unix:{silent}");
    let said = nbd_cli(&["top", "--once", "--timeout", "200ms", &address]);
    says(said, &[&silent, "has not answered for 0.2 s"]);
    assert!(!std::fs::exists(&target).expect("a directory"), "no backup has begun");
    #[cfg(feature = "object-storage")]
    {
        nbd_cli(&["repo", "init", &target]).success();
        let disk = ["backup", "--name", "vm", "--control", &silent, "--export", "vm"];
        let said = nbd_cli(&[&disk[..], &["--timeout", "200ms", &target]].concat());
        says(said, &[&silent, "has not answered for 0.2 s"]);
    }
    // A shell does not wait for long, and completes nothing.
    let words = ["nbd-cli", "control", &silent, "remove-export", ""];
    let completed = nbd_cli(&[&["completions", "--"], &words[..]].concat());
    assert_eq!(completed.success(), "");
}
