//! A server that is killed forgets nothing that the next incremental backup needs.

use rustix::process::Signal;
use serde_json::Value;

use crate::support::image::{are_equal, is_clean};
use crate::support::{Disk, Server, nbd_cli, peer};
use crate::tools;

#[test]
fn the_backup_after_a_kill_is_small_and_complete() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let folder = Disk::sparse();
    let (disk, control) = (folder.beside("disk.qcow2"), folder.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "64M"]);
    let serve = || Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let write = |server: &Server, command: &str| {
        let said = peer(&qemu_io, &["-f", "raw", "-c", command, server.uri()]);
        assert!(!said.contains("failed"), "{said}");
    };
    let kill = |mut server: Server| {
        server.signal(Signal::KILL);
        assert!(!server.wait().success());
    };
    let backup = |more: &[&str]| -> Value {
        let arguments = ["backup", "--control", &control, "--export", "vm", "-B", "daily"];
        let said = nbd_cli(&[&arguments[..], &["--verify=all", "--json"], more].concat());
        serde_json::from_str(&said.success()).expect("JSON")
    };
    let (full, second) = (folder.beside("full.qcow2"), folder.beside("second.qcow2"));

    let server = serve();
    write(&server, "write -P 1 0 8M");
    backup(&[&full]);
    write(&server, "write -P 2 1M 64k");
    kill(server);

    // Also in the middle of a checkpoint, whose bits are in two places then.
    let server = serve();
    write(&server, "write -P 3 20M 64k");
    nbd_cli(&["control", &control, "checkpoint-start", "vm", "--bitmap", "daily"]).success();
    write(&server, "write -P 4 40M 64k");
    kill(server);

    let server = serve();
    let state = folder.beside("state.img");
    nbd_cli(&["copy", server.uri(), &state]).success();
    let report = backup(&["--base", &full, &second]);
    server.end();
    let copied = report["copied"].as_u64().expect("a number");
    assert!((192 << 10..=8 << 20).contains(&copied), "changes, and little more: {report}");
    is_clean(&qemu_img, &disk);
    is_clean(&qemu_img, &second);
    are_equal(&qemu_img, &state, &second);
    let restored = folder.beside("restored.img");
    nbd_cli(&["restore", "--verify", &second, &restored]).success();
    are_equal(&qemu_img, &state, &restored);
}
