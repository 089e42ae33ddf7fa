//! `copy` from and to pipes.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use crate::support::{Disk, PROGRAM, Server, nbd_cli};

/// Runs `nbd-cli copy` with bytes on standard input.
fn copy(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(PROGRAM)
        .arg("copy")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nbd-cli");
    let mut stdin = child.stdin.take().expect("its input");
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // A command that fails does not read everything.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("its end");
    writer.join().expect("the writer");
    output
}

#[test]
fn standard_output_gets_the_disk_in_order() {
    let disk = Disk::sparse();
    let server = Server::ours(&["--read-only", disk.path()]);
    for source in [server.uri(), disk.path()] {
        let output = copy(&["--request-size", "4K", source, "-"], b"");
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout == disk.content(), "{source}");
    }
}

#[test]
fn standard_input_fills_servers_and_files() {
    let disk = Disk::sparse();
    let blank = disk.blank("blank.img", 8 << 20);
    let server = Server::ours(&[&blank]);
    let copied = disk.beside("copy.img");
    for destination in [server.uri(), &copied] {
        let output = copy(&["-", destination], disk.content());
        assert!(output.status.success(), "{output:?}");
    }
    server.end();
    disk.assert_equals(&blank);
    disk.assert_equals(&copied);
}

#[test]
fn a_file_on_standard_input_is_not_copied_onto_itself() {
    let disk = Disk::sparse();
    // With another name it would be truncated before it is read.
    let other = disk.beside("other.img");
    std::fs::hard_link(disk.path(), &other).expect("another name");
    for destination in [disk.path(), &other] {
        let input = std::fs::File::open(disk.path()).expect("a disk");
        let copied = Command::new(PROGRAM).args(["copy", "-", destination]).stdin(input).output();
        let copied = copied.expect("nbd-cli");
        let said = String::from_utf8_lossy(&copied.stderr);
        assert!(said.contains("is the source and the destination"), "{said}");
        assert!(!copied.status.success());
        disk.assert_equals(&other);
    }
}

#[test]
fn a_file_that_ends_in_zeroes_gets_its_full_size() {
    let disk = Disk::sparse();
    let copied = disk.beside("copy.img");
    let output = copy(&["-", &copied], &[0; 1_000_001]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read(&copied).expect("the copy"), [0; 1_000_001]);
}

#[test]
fn input_that_does_not_fit_is_an_error() {
    let server = Server::ours(&["memory:64K"]);
    let output = copy(&["-", server.uri()], &[1; 70_000]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("more than the 65536 bytes"), "{said}");
}

#[test]
fn from_pipe_to_pipe() {
    let disk = Disk::sparse();
    let output = copy(&["-", "-"], disk.content());
    assert!(output.status.success() && output.stdout == disk.content());
}

#[test]
fn a_copy_into_head_is_silent_and_ends_as_cat_does() {
    let disk = Disk::sparse();
    let sources: [&[&str]; 3] = [&[disk.path(), "-"], &["-p", disk.path(), "-"], &["-", "-"]];
    for arguments in sources {
        let mut child = Command::new(PROGRAM)
            .arg("copy")
            .args(arguments)
            .stdin(std::fs::File::open(disk.path()).expect("the disk"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("nbd-cli");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("its end");
        assert_eq!(output.status.code(), Some(141), "128 + SIGPIPE: {arguments:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments:?}");
    }
}

#[test]
fn a_full_disk_at_standard_output_is_an_error() {
    let disk = Disk::sparse();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let output = Command::new(PROGRAM)
        .args(["copy", disk.path(), "-"])
        .stdout(full)
        .output()
        .expect("nbd-cli");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("standard output"), "{said}");
}

#[test]
fn null_is_empty_and_forgets() {
    let disk = Disk::sparse();
    let copied = disk.beside("copy.img");
    nbd_cli(&["copy", disk.path(), "null:"]).success();
    nbd_cli(&["copy", "null:", &copied]).success();
    assert_eq!(std::fs::read(&copied).expect("the copy"), b"");
}
