//! Servers that are restarted during a copy.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, PROGRAM, nbd_cli};
use crate::tools;

/// nbdkit at a socket, without a way to end in order; killed when dropped.
struct Fragile(Child);

impl Fragile {
    fn start(nbdkit: &Path, socket: &str, arguments: &[&str]) -> Self {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new(nbdkit);
        command.args(["-f", "--exit-with-parent", "-U", socket]).args(arguments);
        let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("nbdkit");
        wait_until("nbdkit listens", || std::os::unix::net::UnixStream::connect(socket).is_ok());
        Self(child)
    }
}

impl Drop for Fragile {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command with `--progress`, and `restart` once it has shown progress; returns what it
/// said.
fn with_restart(arguments: &[&str], restart: impl FnOnce()) -> (Option<i32>, String) {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).arg("--progress").stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn().expect("nbd-cli");
    let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
    let mut said = String::new();
    while !said.contains("10 %") && stderr.read_line(&mut said).expect("text") > 0 {}
    restart();
    stderr.read_to_string(&mut said).expect("text");
    (child.wait().expect("a child").code(), said)
}

/// A disk of 8 MiB without a zero in it.
fn full_disk(directory: &Disk) -> String {
    let path = directory.beside("full.img");
    let bytes: Vec<u8> = (0..8_u32 << 20).map(|at| (at / 4096 % 251 + 1) as u8).collect();
    std::fs::write(&path, bytes).expect("room");
    path
}

#[test]
fn a_destination_that_lost_what_was_not_flushed_gets_it_again() {
    tools!(nbdkit = "nbdkit");
    let commands: [&[&str]; 4] = [
        &["copy", "--requests", "2", "--request-size", "64K"],
        &["copy", "--requests", "2", "--request-size", "64K", "--flush"],
        &["restore", "-f", "raw", "--requests", "2"],
        &["image", "convert", "--jobs", "2"],
    ];
    for command in commands {
        let directory = Disk::sparse();
        let (disk, socket) = (full_disk(&directory), directory.beside("socket"));
        let uri = format!("nbd+unix:///?socket={socket}");
        // What is in memory is lost with the process.
        let memory = ["--filter=delay", "memory", "8M", "wdelay=20ms"];
        let mut server = Some(Fragile::start(&nbdkit, &socket, &memory));
        let (code, said) = with_restart(&[command, &[&disk, &uri]].concat(), || {
            drop(server.take());
            server = Some(Fragile::start(&nbdkit, &socket, &memory));
        });
        assert_eq!(code, Some(0), "{command:?}: {said}");
        assert!(said.contains("written again"), "{command:?}: {said}");
        let copied = directory.beside("copied.img");
        nbd_cli(&["copy", &uri, &copied]).success();
        let (is, should) = (std::fs::read(&copied), std::fs::read(&disk));
        assert!(is.expect("a file") == should.expect("a file"), "{command:?}: the copy differs");
    }
}

#[test]
fn a_source_that_is_restarted_is_read_on() {
    tools!(nbdkit = "nbdkit");
    let commands: [&[&str]; 2] = [
        &["copy", "--requests", "2", "--request-size", "64K"],
        &["image", "convert", "--jobs", "2"],
    ];
    for command in commands {
        let directory = Disk::sparse();
        let (disk, socket) = (full_disk(&directory), directory.beside("socket"));
        let (uri, copied) =
            (format!("nbd+unix:///?socket={socket}"), directory.beside("copied.img"));
        let file = format!("file={disk}");
        let source = ["--filter=delay", "file", &file, "rdelay=20ms"];
        let mut server = Some(Fragile::start(&nbdkit, &socket, &source));
        let (code, said) = with_restart(&[command, &[&uri, &copied]].concat(), || {
            drop(server.take());
            server = Some(Fragile::start(&nbdkit, &socket, &source));
        });
        assert_eq!(code, Some(0), "{command:?}: {said}");
        assert!(std::fs::read(&copied).expect("a file") == std::fs::read(&disk).expect("a file"));
    }
}

#[test]
fn standard_input_cannot_be_copied_again_and_that_is_said() {
    tools!(nbdkit = "nbdkit");
    let directory = Disk::sparse();
    let socket = directory.beside("socket");
    let uri = format!("nbd+unix:///?socket={socket}");
    let memory = ["memory", "8M"];
    let server = Fragile::start(&nbdkit, &socket, &memory);
    let mut command = Command::new(PROGRAM);
    command.args(["copy", "--request-size", "64K", "-", &uri]).stdin(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().expect("nbd-cli");
    let mut input = child.stdin.take().expect("piped");
    // More than is read ahead: some of it was written then.
    std::io::Write::write_all(&mut input, &directory.content()[..1 << 20]).expect("a reader");
    drop(server);
    let _server = Fragile::start(&nbdkit, &socket, &memory);
    std::io::Write::write_all(&mut input, &directory.content()[1 << 20..]).expect("a reader");
    drop(input);
    let output = child.wait_with_output().expect("a child");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("standard input cannot be read again"), "{said}");
}
