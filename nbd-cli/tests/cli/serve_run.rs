//! `serve --run`: a command with a private server.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Disk, PROGRAM, nbd_cli, run};

#[test]
fn the_status_of_the_command_is_ours() {
    for (command, status) in [("true", 0), ("exit 7", 7), ("kill -9 $$", 137)] {
        let outcome = nbd_cli(&["serve", "--run", command, "memory:1M"]);
        assert_eq!(outcome.code, Some(status), "{command}: {outcome:?}");
        assert_eq!(outcome.stdout, "", "the output is the command's: {outcome:?}");
    }
}

#[test]
fn the_command_finds_the_server_in_its_environment() {
    let run =
        format!("{PROGRAM} info --size \"$uri\"; test -S \"$unixsocket\" && echo $exportname");
    let text = nbd_cli(&["serve", "--run", &run, "--name", "x", "memory:1M"]).success();
    assert_eq!(text, "1048576\nx\n");
    let run = format!("{PROGRAM} info --size nbd://127.0.0.1:$port/");
    let text = nbd_cli(&["serve", "--listen=127.0.0.1:0", "--run", &run, "memory:2M"]).success();
    assert_eq!(text, "2097152\n");
}

#[test]
fn the_private_socket_and_its_directory_are_removed() {
    let disk = Disk::sparse();
    let directory = disk.beside("temporary");
    std::fs::create_dir(&directory).expect("a directory");
    let mut command = Command::new(PROGRAM);
    command.env("TMPDIR", &directory).args(["serve", "--run", "ls -R $TMPDIR", "memory:1M"]);
    let text = run(&mut command).success();
    assert!(text.contains("socket"), "{text}");
    assert_eq!(std::fs::read_dir(&directory).expect("the directory").count(), 0);
}

#[test]
fn a_signal_is_handed_on_to_the_command() {
    let script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = Command::new(PROGRAM)
        .args(["serve", "--run", script, "memory:1M"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("nbd-cli");
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().expect("its output"));
    stdout.read_line(&mut line).expect("text");
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    assert_eq!(child.wait().expect("its end").code(), Some(5));
}

#[test]
fn what_the_command_wrote_is_in_the_image() {
    let disk = Disk::sparse();
    let image = disk.blank("blank.img", 8 << 20);
    let run = format!("{PROGRAM} copy {} \"$uri\"", disk.path());
    nbd_cli(&["serve", "--run", &run, &image]).success();
    disk.assert_equals(&image);
}
