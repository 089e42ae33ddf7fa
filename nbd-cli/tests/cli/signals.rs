//! Signals that are not meant for the program, and limits that come as signals.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, PROGRAM, Server, nbd_cli, peer, run, says};
use crate::tools;

/// `nbd-cli serve`, started by a shell after other commands.
fn serve_after(preparation: &str, directory: &Disk, arguments: &[&str]) -> Server {
    let socket = directory.beside("socket");
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{preparation}; exec \"$@\"")).arg("sh");
    command.args([PROGRAM, "serve", "--socket", &socket]).args(arguments);
    Server::start(&mut command, socket.into())
}

/// Runs `nbd-cli` after other commands of a shell.
fn nbd_cli_after(preparation: &str, arguments: &[&str]) -> crate::support::Outcome {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{preparation}; exec \"$@\"")).args(["sh", PROGRAM]);
    run(command.args(arguments))
}

#[test]
fn sighup_does_not_end_a_server_without_tls() {
    let server = Server::ours(&["memory:1M"]);
    for _ in 0..3 {
        server.signal(Signal::HUP);
        nbd_cli(&["info", server.uri()]).success();
    }
    server.end();
}

#[test]
fn signals_that_mean_nothing_to_a_server_leave_it_alone() {
    let server = Server::ours(&["memory:1M"]);
    for signal in [
        Signal::USR1,
        Signal::USR2,
        Signal::IO,
        Signal::PIPE,
        Signal::CHILD,
        Signal::XFSZ,
        Signal::WINCH,
        Signal::CONT,
    ] {
        server.signal(signal);
        nbd_cli(&["info", server.uri()]).success();
    }
    for signal in [Signal::TSTP, Signal::TTIN, Signal::TTOU] {
        server.signal(signal);
        server.signal(Signal::CONT);
        nbd_cli(&["info", server.uri()]).success();
    }
    server.end();
}

#[test]
fn every_signal_that_ends_a_server_ends_it_in_order() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    for signal in [
        Signal::TERM,
        Signal::INT,
        Signal::ALARM,
        Signal::VTALARM,
        Signal::PROF,
        Signal::XCPU,
        Signal::POWER,
    ] {
        let directory = Disk::sparse();
        let image = directory.beside("disk.qcow2");
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "8M"]);
        nbd_cli(&["bitmap", "add", &image, "daily"]).success();
        let mut server = Server::ours(&[&image]);
        peer(&qemu_io, &["-f", "raw", "-c", "write 1M 64k", server.uri()]);
        server.signal(signal);
        assert_eq!(server.wait().code(), Some(0), "{signal:?}");
        assert!(!server.socket().exists(), "{signal:?}: the socket stays");
        let left = format!("{image}.dirty");
        assert!(!Path::new(&left).exists(), "{signal:?}: the file beside the image stays");
        let listed = nbd_cli(&["bitmap", "list", &image]).success();
        assert!(listed.contains("64"), "{signal:?}: {listed}");
    }
}

#[test]
fn sigquit_ends_a_server_in_order_unless_it_was_ignored() {
    let directory = Disk::sparse();
    let mut server = Server::ours(&["memory:1M"]);
    // A test that runs in the background of a script inherits that SIGQUIT is ignored.
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).expect("a mask");
    let ignored = u64::from_str_radix(ignored, 16).expect("a number");
    server.signal(Signal::QUIT);
    if ignored & 1 << (Signal::QUIT.as_raw() - 1) == 0 {
        assert_eq!(server.wait().code(), Some(0));
        assert!(!server.socket().exists());
    } else {
        server.end();
    }
    let server = serve_after("trap '' QUIT", &directory, &["memory:1M"]);
    server.signal(Signal::QUIT);
    nbd_cli(&["info", &server.uri_of("")]).success();
    server.end();
}

#[test]
fn a_server_in_a_terminal_that_is_closed_ends_in_order() {
    tools!(script = "script");
    for (preparation, ends) in [("true", true), ("trap '' HUP", false)] {
        let directory = Disk::sparse();
        let socket = directory.beside("socket");
        let serve = format!("{preparation}; exec {PROGRAM} serve --socket {socket} memory:1M");
        let mut terminal = Command::new(&script);
        terminal.args(["-qec", &serve, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut terminal = terminal.spawn().expect("script");
        wait_until("the server listens", || Path::new(&socket).exists());
        terminal.kill().expect("it runs");
        terminal.wait().expect("a child");
        let uri = format!("nbd+unix:///?socket={socket}");
        if ends {
            wait_until("the server has ended", || !Path::new(&socket).exists());
        } else {
            nbd_cli(&["info", &uri]).success();
            let pids = nbd_cli(&["info", "--json", &uri]);
            assert_eq!(pids.code, Some(0));
            end_server_at(&socket);
        }
    }
}

/// Ends a server that is nobody's child, by the process that holds its socket.
fn end_server_at(socket: &str) {
    let wanted = format!("--socket\0{socket}\0");
    for entry in std::fs::read_dir("/proc").expect("Linux").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(&wanted) {
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::TERM));
        }
    }
    wait_until("the server has ended", || !Path::new(socket).exists());
}

#[test]
fn qemu_nbd_ends_on_sighup_as_qemus_does_and_passes_over_what_means_nothing() {
    let directory = Disk::sparse();
    let socket = directory.beside("socket");
    for (signals, last) in
        [(&[Signal::USR1, Signal::USR2, Signal::IO][..], Signal::HUP), (&[], Signal::XCPU)]
    {
        let mut command = Command::new(PROGRAM);
        command.args(["qemu-nbd", "-t", "-k", &socket, "-f", "raw", directory.path()]);
        let mut server = command.spawn().expect("nbd-cli");
        wait_until("the server listens", || Path::new(&socket).exists());
        let uri = format!("nbd+unix:///?socket={socket}");
        for signal in signals {
            kill_process(Pid::from_child(&server), *signal).expect("it runs");
            nbd_cli(&["info", &uri]).success();
        }
        kill_process(Pid::from_child(&server), last).expect("it runs");
        assert_eq!(server.wait().expect("a child").code(), Some(0), "{last:?}");
        assert!(!Path::new(&socket).exists(), "{last:?}");
    }
}

#[test]
fn a_low_limit_of_open_files_does_not_limit_the_connections() {
    let directory = Disk::sparse();
    let server = serve_after("ulimit -Sn 32", &directory, &["memory:1M"]);
    let clients: Vec<_> = (0..64)
        .map(|_| {
            let mut client = UnixStream::connect(server.socket()).expect("a connection");
            client.set_read_timeout(Some(Duration::from_secs(60))).expect("a time limit");
            let mut greeting = [0; 18];
            client.read_exact(&mut greeting).expect("the greeting");
            client
        })
        .collect();
    drop(clients);
    server.end();
}

#[test]
fn a_limit_on_the_size_of_files_is_enospc_for_clients() {
    tools!(qemu_io = "qemu-io", qemu_img = "qemu-img");
    let directory = Disk::sparse();
    for format in ["raw", "qcow2"] {
        let image = directory.beside(format);
        peer(&qemu_img, &["create", "-q", "-f", format, &image, "64M"]);
        // Units of 512 or 1024 bytes.
        let server = serve_after("ulimit -f 4096", &directory, &["--format", format, &image]);
        let write = |offset: &str| {
            run(Command::new(&qemu_io).args(["-f", "raw", "-c"]).args([
                &format!("write -P 7 {offset} 6M"),
                "-c",
                "flush",
                server.uri(),
            ]))
        };
        let failed = write("32M");
        assert!(failed.stdout.contains("No space left"), "{format}: {failed:?}");
        let read = ["-f", "raw", "-c", "read 0 64k", server.uri()];
        peer(&qemu_io, &read);
        nbd_cli(&["info", server.uri()]).success();
        server.end();
        if format == "qcow2" {
            peer(&qemu_img, &["check", "-q", &image]);
        }
    }
}

/// The log often lies on the disk that is full.
#[test]
fn a_server_that_cannot_write_its_log_goes_on() {
    tools!(qemu_io = "qemu-io", qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let image = directory.beside("qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "64M"]);
    let preparation = "ulimit -f 4096; exec 2>/dev/full";
    let server = serve_after(preparation, &directory, &["--format", "qcow2", &image]);
    let mut client = Command::new(&qemu_io);
    client.args(["-f", "raw", "-c", "write -P 1 0 64k"]);
    client.args(["-c", "write -P 7 32M 6M", "-c", "write -P 7 40M 6M", "-c", "read -P 1 0 64k"]);
    let said = run(client.arg(server.uri())).stdout;
    assert_eq!(said.matches("No space left").count(), 2, "{said}");
    assert!(said.contains("read 65536/65536 bytes"), "{said}");
    server.end();
}

#[test]
fn commands_that_meet_a_limit_on_the_size_of_files_say_so() {
    let disk = Disk::sparse();
    let (raw, qcow2) = (disk.beside("copy.img"), disk.beside("copy.qcow2"));
    let commands: [&[&str]; 5] = [
        &["copy", "--allocated", disk.path(), &raw],
        &["image", "convert", "-O", "raw", disk.path(), &raw],
        &["image", "convert", "-O", "qcow2", disk.path(), &qcow2],
        &["restore", "-f", "raw", "-O", "qcow2", disk.path(), &qcow2],
        &["image", "create", "--preallocation", "full", "-f", "raw", &raw, "8M"],
    ];
    for command in commands {
        says(nbd_cli_after("ulimit -f 512", command), &["larger than the limit", "ulimit -f"]);
        let _ = std::fs::remove_file(&raw);
    }
}

#[test]
fn a_command_of_run_inherits_no_ignored_signal() {
    let directory = Disk::sparse();
    let report = directory.beside("report");
    let look = format!("grep -E 'Sig(Ign|Cgt)' /proc/self/status > {report}");
    nbd_cli(&["serve", "--run", &look, "memory:1M"]).success();
    let report = std::fs::read_to_string(&report).expect("what the command wrote");
    let line = report.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a mask");
    let ignored = u64::from_str_radix(line.trim(), 16).expect("a number");
    for signal in [Signal::XFSZ, Signal::PIPE, Signal::USR1, Signal::HUP, Signal::XCPU] {
        assert_eq!(ignored & 1 << (signal.as_raw() - 1), 0, "{signal:?}: {report}");
    }
}

#[test]
fn an_interrupted_command_that_waits_for_a_server_ends_with_128_and_the_number() {
    let disk = Disk::sparse();
    let silent = disk.beside("silent");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).expect("a socket");
    let uri = format!("nbd+unix:///?socket={silent}");
    let copied = disk.beside("copy.img");
    let qcow2 = disk.beside("copy.qcow2");
    let commands: [&[&str]; 5] = [
        &["copy", &uri, &copied],
        &["copy", "-", &copied],
        &["restore", "-f", "raw", disk.path(), &uri],
        &["image", "convert", &uri, &copied],
        &["backup", &uri, &qcow2],
    ];
    for command in commands {
        let mut child = Command::new(PROGRAM);
        child.args(command).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().expect("nbd-cli");
        let catches_sigint = || {
            let status = format!("/proc/{}/status", child.id());
            let status = std::fs::read_to_string(status).unwrap_or_default();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:\t"));
            let caught = caught.and_then(|mask| u64::from_str_radix(mask, 16).ok());
            // Its handlers are installed one by one; the thread is there after them.
            caught.is_some_and(|mask| mask & 1 << (Signal::TERM.as_raw() - 1) != 0)
                && status.contains("Threads:\t")
                && !status.contains("Threads:\t1\n")
        };
        wait_until("it catches signals", catches_sigint);
        kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
        // To wait for a child closes its input, and that may not be what ends it.
        let _input = child.stdin.take();
        let status = child.wait().expect("a child");
        let mut said = String::new();
        child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
        assert_eq!(status.code(), Some(143), "{command:?}: {said}");
        assert!(said.contains("SIGTERM") && said.lines().count() == 1, "{command:?}: {said}");
    }
}
