//! `serve --fork`: returns when clients can connect.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, nbd_cli};

fn pid(file: &Path) -> Pid {
    let text = std::fs::read_to_string(file).expect("the file with the process id");
    Pid::from_raw(text.trim().parse().expect("a number")).expect("a process id")
}

#[test]
fn it_returns_when_clients_can_connect_and_says_where() {
    let disk = Disk::sparse();
    let (socket, pid_file) = (disk.beside("socket"), disk.beside("pid"));
    let arguments =
        ["serve", "-f", "raw", "--fork", "--pid-file", &pid_file, "--socket", &socket, disk.path()];
    // The outcome is known only when nobody holds the pipes any more: the server let go of them.
    let started = nbd_cli(&arguments);
    let uri = format!("nbd+unix:///?socket={socket}\n");
    assert_eq!((started.stdout.as_str(), started.stderr.as_str()), (uri.as_str(), ""));
    assert_eq!(started.code, Some(0));
    assert_eq!(nbd_cli(&["info", "--size", uri.trim()]).success(), "8388608\n");

    let refused = nbd_cli(&arguments);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("has it open for writing"), "{refused:?}");

    kill_process(pid(Path::new(&pid_file)), Signal::TERM).expect("a running server");
    wait_until("the server ended", || !Path::new(&socket).exists());
}

#[test]
fn a_start_that_fails_is_an_error_with_its_reason() {
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    for (arguments, part) in [
        (&["/nonexistent/disk"][..], "/nonexistent/disk"),
        (&["--bitmap", "nosuch", disk.path()], "nosuch"),
        (&["--pid-file", "/nonexistent/pid", disk.path()], "/nonexistent/pid"),
    ] {
        let start = ["serve", "-f", "raw", "--fork", "--socket", &socket];
        let failed = nbd_cli(&[&start[..], arguments].concat());
        assert!(failed.failure().contains(part), "{arguments:?}");
        assert!(!Path::new(&socket).exists(), "{arguments:?}");
    }
}

#[test]
fn a_disk_that_is_named_as_the_pid_file_is_left_as_it_is() {
    let disk = Disk::sparse();
    let (socket, small) = (disk.beside("socket"), disk.beside("small"));
    std::fs::write(&small, "notes").expect("a file");
    for (file, content) in [(disk.path(), disk.content()), (&small, &b"notes"[..])] {
        for command in [&["serve", "--socket"][..], &["qemu-nbd", "-f", "raw", "-k"]] {
            let fork = [&socket, "--fork", "--pid-file", file, &disk.beside("served")];
            std::fs::write(disk.beside("served"), [7; 512]).expect("a file");
            let refused = nbd_cli(&[command, &fork].concat());
            assert_eq!(refused.code, Some(1), "{refused:?}");
            assert!(refused.stderr.contains("there is something else in it"), "{refused:?}");
            assert!(std::fs::read(file).expect("a file") == content, "{command:?}");
        }
    }
}

#[test]
fn a_command_cannot_be_waited_for_in_the_background() {
    let outcome = nbd_cli(&["serve", "--fork", "--run", "true", "memory:1M"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("--fork"), "{outcome:?}");
}
