//! A backup of a disk in use that the user interrupts.

use std::os::unix::net::UnixListener;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, Server, in_foreground, nbd_cli, peer};
use crate::tools;

#[test]
fn a_backup_that_is_interrupted_ends_its_checkpoint_and_forgets_nothing() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "16M"]);
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    nbd_cli(&["control", &control, "bitmap-add", "vm", "daily"]).success();
    peer(&qemu_io, &["-f", "raw", "-c", "write 1M 64k", server.uri()]);
    let state = || -> Value {
        let listing = nbd_cli(&["control", &control, "--json", "list"]).success();
        let listing: Value = serde_json::from_str(&listing).expect("JSON");
        listing["exports"][0].clone()
    };
    // The listener here never says a word.
    let (silent, target) = (directory.beside("silent"), directory.beside("full.qcow2"));
    let _listener = UnixListener::bind(&silent).expect("a socket");
    let mut command = in_foreground();
    command.args(["backup", "--control", &control, "--export", "vm", "-B", "daily"]);
    command.arg(format!("nbd+unix:///vm?socket={silent}")).arg(&target);
    let backup = command.stderr(Stdio::piped()).spawn().expect("nbd-cli");
    wait_until("the checkpoint has begun", || state()["checkpoint"] != Value::Null);
    kill_process(Pid::from_child(&backup), Signal::INT).expect("it runs");
    let output = backup.wait_with_output().expect("a child");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(128 + 2), "{said}");
    assert!(said.contains("failed: interrupted by SIGINT; begin again with --restart"), "{said}");
    let found = state();
    assert_eq!(found["checkpoint"], Value::Null, "{found}");
    assert_eq!(found["bitmaps"][0]["dirty-bytes"], 64 << 10, "{found}");
    let again = ["backup", "--control", &control, "--export", "vm", "-B", "daily", "--verify=all"];
    nbd_cli(&[&again[..], &["--restart", &target]].concat()).success();
    server.end();
}
