//! A backup of a disk in use that is killed and cannot clean up.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::image::{are_equal, is_clean};
use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, PROGRAM, Server, nbd_cli, peer};
use crate::tools;

/// The first export as the control socket describes it.
fn state(control: &str) -> Value {
    let listing = nbd_cli(&["control", control, "--json", "list"]).success();
    let listing: Value = serde_json::from_str(&listing).expect("JSON");
    listing["exports"][0].clone()
}

#[test]
fn a_backup_that_is_killed_leaves_no_checkpoint_and_forgets_nothing() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "16M"]);
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let write = |command: &str| drop(peer(&qemu_io, &["-f", "raw", "-c", command, server.uri()]));
    // The listener here never says a word.
    let silent = directory.beside("silent");
    let _listener = UnixListener::bind(&silent).expect("a socket");
    let arguments = ["backup", "--control", &control, "--export", "vm", "-B", "daily"];
    let kill_in_the_middle = |more: &[&str], meanwhile: &str| {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).args(more).stderr(Stdio::null());
        let mut backup = command.spawn().expect("nbd-cli");
        wait_until("the checkpoint has begun", || state(&control)["checkpoint"] != Value::Null);
        write(meanwhile);
        kill_process(Pid::from_child(&backup), Signal::KILL).expect("it runs");
        assert_eq!(backup.wait().expect("a child").code(), None);
        wait_until("the checkpoint has ended", || state(&control)["checkpoint"] == Value::Null);
    };
    let (silent, full) =
        (format!("nbd+unix:///vm?socket={silent}"), directory.beside("full.qcow2"));

    // What is noted since the begin of a full backup is nothing to build on.
    kill_in_the_middle(&[&silent, &full], "write -P 1 1M 64k");
    assert_eq!(state(&control)["bitmaps"].as_array().map(Vec::len), Some(0));
    nbd_cli(&[&arguments[..], &["--restart", &full]].concat()).success();

    write("write -P 2 4M 64k");
    let next = directory.beside("next.qcow2");
    kill_in_the_middle(&["--base", &full, &silent, &next], "write -P 3 8M 64k");
    let found = state(&control);
    assert_eq!(found["bitmaps"][0]["dirty-bytes"], 128 << 10, "both times together: {found}");
    let last = ["--base", &full, "--restart", "--verify=all", "--json", &next];
    let report = nbd_cli(&[&arguments[..], &last].concat()).success();
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["copied"], 128 << 10, "{report}");
    server.end();
    are_equal(&qemu_img, &disk, &next);
    is_clean(&qemu_img, &disk);
}

/// A connection to the control socket.
struct Conversation(BufReader<UnixStream>);

impl Conversation {
    fn begin(control: &str) -> Self {
        Self(BufReader::new(UnixStream::connect(control).expect("it listens")))
    }

    fn ask(&mut self, request: &str) -> Value {
        let mut reply = String::new();
        self.0.get_mut().write_all(format!("{request}\n").as_bytes()).expect("it is read");
        self.0.read_line(&mut reply).expect("a reply");
        serde_json::from_str(&reply).expect("JSON")
    }
}

#[test]
fn only_checkpoints_that_ask_for_it_end_with_their_connection() {
    let directory = Disk::sparse();
    let control = directory.beside("control");
    let server = Server::ours(&["--control", &control, "vm=memory:1M", "other=memory:1M"]);
    let start = |export: &str, lifetime: &str| {
        let mut conversation = Conversation::begin(&control);
        let reply = conversation.ask(&format!(
            r#"{{"command":"checkpoint-start","export":"{export}","lifetime":"{lifetime}"}}"#
        ));
        assert!(reply["result"]["view"].is_string(), "{reply}");
        conversation
    };
    let mut lasting = Conversation::begin(&control);
    lasting.ask(r#"{"command":"checkpoint-start","export":"other"}"#);
    drop(lasting);
    drop(start("vm", "connection"));
    wait_until("the checkpoint has ended", || {
        let mut other = Conversation::begin(&control);
        let listing = other.ask(r#"{"command":"list"}"#);
        let exports = listing["result"]["exports"].as_array().expect("a list").clone();
        let names: Vec<_> = exports.iter().map(|export| &export["name"]).collect();
        assert!(names.iter().any(|name| *name == "other.checkpoint"), "it lasts: {names:?}");
        names.len() == 3
    });

    // Somebody else has ended it and begun another one, which is not the first one's to end.
    let first = start("vm", "connection");
    nbd_cli(&["control", &control, "checkpoint-end", "vm", "failure"]).success();
    nbd_cli(&["control", &control, "checkpoint-start", "vm"]).success();
    drop(first);
    std::thread::sleep(std::time::Duration::from_millis(200));
    nbd_cli(&["control", &control, "checkpoint-end", "vm", "success"]).success();
    server.end();
}
