//! The server as a service: what it tells a service manager, its socket files, its units.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::{PROGRAM, Server, nbd_cli, run};
use crate::tools;

/// Waits for a message that begins with a word; others may come before.
fn wait_for(manager: &UnixDatagram, word: &str) -> String {
    let mut buffer = [0; 4096];
    loop {
        let length = manager.recv(&mut buffer).expect(word);
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        if text.starts_with(word) {
            return text;
        }
    }
}

#[test]
fn a_service_manager_is_told_what_the_server_does() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name| directory.path().join(name);
    let manager = UnixDatagram::bind(path("notify")).expect("a socket");
    manager.set_read_timeout(Some(Duration::from_secs(30))).expect("a limit");
    std::fs::write(path("config"), "[[export]]\nsource = \"memory:1M\"\n").expect("a file");
    let text = format!("socket = {:?}\n", path("socket"));
    let config = text + &std::fs::read_to_string(path("config")).expect("text");
    std::fs::write(path("config"), config).expect("a file");
    let mut command = Command::new(PROGRAM);
    command.arg("serve").arg("--config").arg(path("config"));
    command.env("NOTIFY_SOCKET", path("notify")).env("WATCHDOG_USEC", "200000");
    let server = Server::start(&mut command, path("socket"));
    wait_for(&manager, "READY=1");
    wait_for(&manager, "WATCHDOG=1");
    wait_for(&manager, "WATCHDOG=1");
    server.signal(Signal::HUP);
    assert!(wait_for(&manager, "RELOADING=1").contains("MONOTONIC_USEC="));
    wait_for(&manager, "READY=1");
    server.signal(Signal::TERM);
    wait_for(&manager, "STOPPING=1");
}

#[test]
fn a_service_manager_that_does_not_listen_stops_nobody() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("socket");
    let mut command = Command::new(PROGRAM);
    command.env("NOTIFY_SOCKET", "/nonexistent/notify").arg("serve").arg("--socket").arg(&socket);
    Server::start(command.arg("memory:1M"), socket).end();
}

#[test]
fn socket_files_have_the_mode_and_the_group_they_are_given() {
    let group = rustix::process::getegid().as_raw().to_string();
    let user = rustix::process::geteuid().as_raw().to_string();
    let arguments = ["--socket-mode", "620", "--socket-group", &group, "--socket-owner", &user];
    let server = Server::ours(&[&arguments[..], &["memory:1M"]].concat());
    let metadata = std::fs::metadata(server.socket()).expect("a socket");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o620);
    assert_eq!(metadata.gid().to_string(), group);
    nbd_cli(&["info", server.uri()]).success();
    server.end();
    for (arguments, part) in [
        (&["--socket-mode", "rw"][..], "octal"),
        (&["--socket-owner", "no-such-user"], "no user 'no-such-user'"),
    ] {
        let all = [&["serve", "--socket", "/nonexistent/s"], arguments, &["memory:1M"]].concat();
        let outcome = nbd_cli(&all);
        assert!(outcome.code == Some(1) && outcome.stderr.contains(part), "{outcome:?}");
    }
}

/// Writes the units of an instance, with this program, into a directory.
fn units(directory: &Path) -> [String; 2] {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd");
    ["nbd-cli@.service", "nbd-cli@.socket"].map(|name| {
        let unit = std::fs::read_to_string(source.join(name)).expect("a unit");
        let unit = unit.replace("ExecStart=nbd-cli", &format!("ExecStart={PROGRAM}"));
        let path = directory.join(name.replace('@', "@disk"));
        std::fs::write(&path, unit).expect("a file");
        path.to_str().expect("a plain name").to_owned()
    })
}

#[test]
fn systemd_accepts_the_units_and_finds_them_hardened() {
    tools!(analyze = "systemd-analyze");
    let directory = tempfile::tempdir().expect("a directory");
    let units = units(directory.path());
    let verified = run(Command::new(&analyze).args(["verify", "--man=no"]).args(&units));
    assert_eq!((verified.code, verified.stderr.as_str()), (Some(0), ""), "{verified:?}");
    // An exposure of 2.0.
    let mut security = Command::new(&analyze);
    let judged = run(security.args(["security", "--offline=true", "--threshold=20", &units[0]]));
    assert_eq!(judged.code, Some(0), "{judged:?}");
}
