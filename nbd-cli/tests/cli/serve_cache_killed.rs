//! A server with direct I/O is killed under a load with flushes: the image is sound, and holds what
//! was acknowledged.

use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::serve_cache::has_direct_io;
use crate::support::{Disk, PROGRAM, Server, nbd_cli, peer};
use crate::tools;

/// The load and its servers, by one of which reads wait for the disk in this way.
fn killed_in_the_middle(disk: &Disk, format: &str, aio: &str, path: &str) {
    let beside = |name: &str| disk.beside(&format!("{name}-{format}-{aio}"));
    let (socket, state) = (beside("socket"), beside("state"));
    let serve = || {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--cache", "none", "--aio", aio, "-f", format]);
        command.args(["--socket", &socket, path]);
        Server::start(&mut command, socket.clone().into())
    };
    let mut server = serve();
    let mut command = Command::new(PROGRAM);
    // Two connections that read and write a part of the disk again and again.
    command.args(["bench", "-w", "mixed", "--verify", "--destroy-data", "--verify-state", &state]);
    command.args(["-d", "8", "-C", "2", "--flush-every", "50", "--range", "0+1M"]);
    command.args(["--duration", "2s", server.uri()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let load = command.spawn().expect("nbd-cli");
    std::thread::sleep(Duration::from_millis(700));
    server.signal(Signal::KILL);
    server.wait();
    if format == "qcow2" {
        // A crash leaves leaked clusters at worst.
        let check = nbd_cli(&["image", "check", path]);
        assert!(matches!(check.code, Some(0 | 3)), "{aio}: {check:?}");
    }
    let server = serve();
    let output = load.wait_with_output().expect("its end");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{format} {aio}: {text} {output:?}");
    server.end();
    // Another server, and what is on the disk.
    let server = serve();
    let look = ["bench", "--verify-only", "--verify-state", &state, server.uri()];
    nbd_cli(&look).success();
    server.end();
}

#[test]
fn server_killed_past_the_page_cache_leaves_a_sound_image_with_all_that_was_acknowledged() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    if !has_direct_io(disk.path()) {
        eprintln!("skipped: no direct I/O in the directory for temporary files");
        return;
    }
    for aio in ["auto", "threads"] {
        for format in ["raw", "qcow2"] {
            let path = disk.beside(&format!("{aio}.{format}"));
            peer(&qemu_img, &["create", "-q", "-f", format, &path, "8M"]);
            killed_in_the_middle(&disk, format, aio, &path);
            if format == "qcow2" {
                nbd_cli(&["image", "check", "-r", "leaks", &path]).success();
                peer(&qemu_img, &["check", "-q", "-f", format, &path]);
            }
        }
    }
}
