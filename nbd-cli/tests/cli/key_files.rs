//! Key files: read by the process that opens the image, when it opens it.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::encrypted::{PASSPHRASE, volume};
use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, PROGRAM, nbd_cli, says};
use crate::tools;

fn shell(script: &str) -> std::process::Output {
    Command::new("sh").args(["-c", script]).output().expect("a shell")
}

#[test]
fn a_server_in_the_background_gets_what_can_be_read_only_once() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (image, key) = volume(&disk, &qemu_img);
    let (socket, pid_file, copy) = (disk.beside("s"), disk.beside("pid"), disk.beside("copy"));
    let serve = |key: &str| {
        format!(
            "'{PROGRAM}' serve --fork -r --socket '{socket}' --pid-file '{pid_file}' \
             --key-file {key} '{image}'"
        )
    };
    for script in [
        format!("printf %s '{PASSPHRASE}' | {}", serve("-")),
        format!("printf %s '{PASSPHRASE}' | {{ {} 3<&0 </dev/null; }}", serve("/dev/fd/3")),
        serve(&key),
        // The first one is used up, and does not open it.
        format!("printf %s wrong | {}", serve(&format!("- --key-file '{key}'"))),
    ] {
        let started = shell(&script);
        assert!(started.status.success(), "{script}: {started:?}");
        let uri = format!("nbd+unix:///?socket={socket}");
        nbd_cli(&["copy", &uri, &copy]).success();
        disk.assert_equals(&copy);
        std::fs::remove_file(&copy).expect("a copy");
        let pid = std::fs::read_to_string(&pid_file).expect("a process id");
        let pid = Pid::from_raw(pid.trim().parse().expect("a number")).expect("a process");
        kill_process(pid, Signal::TERM).expect("a running server");
        wait_until("the server ended", || !std::path::Path::new(&socket).exists());
    }
}

#[test]
fn pipes_are_read_once_for_all_images_of_a_command() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (image, _) = volume(&disk, &qemu_img);
    let script = format!(
        "printf %s '{PASSPHRASE}' | '{PROGRAM}' serve -r --socket '{}' --key-file - \
         --run true a='{image}' b='{image}'",
        disk.beside("s")
    );
    let outcome = shell(&script);
    assert!(outcome.status.success(), "{outcome:?}");
}

#[test]
fn a_reload_reads_only_the_keys_of_exports_that_it_opens() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (image, key) = volume(&disk, &qemu_img);
    let [config, socket, control] = ["config", "socket", "control"].map(|name| disk.beside(name));
    let write = |key: &str, more: &str| {
        let text = format!(
            "socket = \"{socket}\"\ncontrol = \"{control}\"\n[[export]]\nname = \"secret\"\n\
             source = \"{image}\"\nkey-file = \"{key}\"\n{more}"
        );
        std::fs::write(&config, text).expect("room");
    };
    for descriptor in ["-", "/dev/fd/3"] {
        write(descriptor, "");
        says(nbd_cli(&["serve", "--check", "--config", &config]), &["line 3", "is not a file"]);
    }
    write(&key, "");
    let serve = format!("'{PROGRAM}' serve --fork --config '{config}' --pid-file '{socket}.pid'");
    let started = shell(&serve);
    assert!(started.status.success(), "{started:?}");
    std::fs::remove_file(&key).expect("a key file");
    write(&key, "[[export]]\nname = \"new\"\nsource = \"memory:1M\"\n");
    nbd_cli(&["control", &control, "reload", "--json"]).success();
    for name in ["new", "secret"] {
        nbd_cli(&["info", "--size", &format!("nbd+unix:///{name}?socket={socket}")]).success();
    }
    let pid = std::fs::read_to_string(format!("{socket}.pid")).expect("a process id");
    let pid = Pid::from_raw(pid.trim().parse().expect("a number")).expect("a process");
    kill_process(pid, Signal::TERM).expect("a running server");
    wait_until("the server ended", || !std::path::Path::new(&socket).exists());
}

/// Types `typed` when a passphrase is asked for, and returns what the terminal shows.
fn at_terminal(script: &std::path::Path, command: &str, typed: &[u8]) -> String {
    let mut terminal = Command::new(script)
        .args(["-qec", command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a terminal");
    let mut stdin = terminal.stdin.take().expect("a pipe");
    let mut stdout = terminal.stdout.take().expect("a pipe");
    let (mut shown, mut part, mut is_asked) = (Vec::new(), [0; 4096], false);
    while let Ok(length @ 1..) = stdout.read(&mut part) {
        shown.extend_from_slice(&part[..length]);
        if !is_asked && shown.windows(11).any(|window| window == b"Passphrase:") {
            is_asked = true;
            stdin.write_all(typed).expect("a terminal");
        }
    }
    terminal.wait().expect("its end");
    String::from_utf8_lossy(&shown).into_owned()
}

#[test]
fn a_passphrase_is_typed_unseen_and_a_signal_restores_the_terminal() {
    tools!(qemu_img = "qemu-img", script = "script");
    let disk = Disk::sparse();
    let (image, _) = volume(&disk, &qemu_img);
    let asks = format!("'{PROGRAM}' image map --key-file - '{image}'");
    let line = format!("{PASSPHRASE}\n");
    let shown = at_terminal(&script, &format!("{asks} && echo opened"), line.as_bytes());
    assert!(shown.contains("opened") && !shown.contains(PASSPHRASE), "{shown}");
    // Bytes that are not text are a wrong passphrase, not an error of reading.
    let shown = at_terminal(&script, &asks, b"\xff\xfe\n");
    assert!(shown.contains("opens none of its key slots"), "{shown}");
    // The key of an interrupt.
    let then = format!("trap : INT; {asks}; echo status $?; stty -a");
    let shown = at_terminal(&script, &then, b"\x03");
    assert!(shown.contains("status 130") && shown.contains(" echo "), "{shown}");
}
