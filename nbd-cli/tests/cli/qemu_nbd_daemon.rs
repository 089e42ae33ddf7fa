//! The qemu-nbd form in the background.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rustix::process::{Signal, kill_process};

use crate::support::qemu_nbd::{Daemon, Foreground, Killed, ours, qemu_nbd, wait_until};
use crate::support::service_manager::started_by_service_manager;
use crate::support::{Disk, nbd_cli, peer, run};
use crate::tools;

#[test]
fn fork_returns_when_clients_can_connect_and_the_pid_file_is_written() {
    tools!(nbdinfo = "nbdinfo", nbdcopy = "nbdcopy", qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (daemon, started) =
        Daemon::start(&["--persistent", "--shared=5", "--read-only", "--format=raw", disk.path()]);
    // The outcome is known only when nobody holds the pipes any more: the daemon let go of them.
    assert_eq!((started.success().as_str(), daemon.is_running()), ("", true));
    assert_eq!(peer(&nbdinfo, &["--size", &daemon.uri()]), "8388608\n");
    let copy = disk.beside("copy.img");
    peer(&nbdcopy, &["--connections=4", &daemon.uri(), &copy]);
    disk.assert_equals(&copy);
    peer(&qemu_img, &["compare", "-fraw", "-Fraw", disk.path(), &daemon.uri()]);
    assert!(daemon.is_running());
    let directory = format!("/proc/{}/cwd", daemon.pid().as_raw_nonzero());
    assert_eq!(std::fs::read_link(directory).expect("its directory").to_str(), Some("/"));
    kill_process(daemon.pid(), Signal::TERM).expect("a running daemon");
    daemon.wait_for_end();
    assert!(!daemon.socket().exists());
}

#[test]
fn a_failed_start_is_reported_by_the_parent() {
    let disk = Disk::sparse();
    for (arguments, part) in [
        (&["-f", "raw", "/nonexistent/disk"][..], "/nonexistent/disk"),
        (&["-f", "raw", "-o", "9000000", disk.path()], "9000000"),
        (&["-f", "nosuch", disk.path()], "nosuch"),
        (&["-f", "raw", "--pid-file", "/nonexistent/pid", disk.path()], "/nonexistent/pid"),
    ] {
        let (daemon, started) = Daemon::start(arguments);
        assert_eq!(started.code, Some(1), "{started:?}");
        assert!(started.stderr.starts_with("qemu-nbd: "), "{started:?}");
        assert!(started.stderr.contains(part), "{started:?}");
        assert!(!daemon.pid_file().exists() && !daemon.socket().exists(), "{arguments:?}");
    }
}

#[test]
fn a_pid_file_belongs_to_one_daemon_at_a_time() {
    let disk = Disk::sparse();
    let (daemon, started) = Daemon::start(&["-t", "-r", "-f", "raw", disk.path()]);
    started.success();
    let pid_file = daemon.pid_file();
    let pid_file = pid_file.to_str().expect("a plain name");
    let second = ["--fork", "--pid-file", pid_file, "-k", &disk.beside("s"), "-r", disk.path()];
    let refused = qemu_nbd(&second);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("lock"), "{refused:?}");
    let first = daemon.pid();
    kill_process(first, Signal::TERM).expect("a running daemon");
    daemon.wait_for_end();
    assert_eq!(qemu_nbd(&second).code, Some(0), "the file without its owner is free");
    assert_ne!(daemon.pid(), first);
}

#[test]
fn it_ends_with_the_last_client_that_used_the_disk_and_not_with_a_port_scan() {
    let disk = Disk::sparse();
    let (daemon, started) = Daemon::start(&["-e", "2", "-f", "raw", disk.path()]);
    started.success();
    drop(UnixStream::connect(daemon.socket()).expect("a connection"));
    let socket = daemon.socket();
    let socket = socket.to_str().expect("a plain name");
    assert!(qemu_nbd(&["-L", "-k", socket]).success().contains("exports available: 1"));
    nbd_cli(&["info", "--list", &daemon.uri()]).success();
    assert!(daemon.is_running());
    nbd_cli(&["copy", &daemon.uri(), &disk.beside("copy.img")]).success();
    daemon.wait_for_end();
    assert!(!daemon.socket().exists());
}

#[test]
fn the_next_server_starts_on_a_socket_whose_last_client_has_just_left() {
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let uri = format!("nbd+unix:///?socket={socket}");
    let mut servers = Vec::new();
    for round in 0..30 {
        let mut server = ours();
        server.args(["-r", "-f", "raw", "-k", &socket, disk.path()]);
        let child = server.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        servers.push(Killed(child.expect("a program")));
        let child = &mut servers.last_mut().expect("it was pushed").0;
        // Until the server listens, and while the one before it goes, clients meet nobody.
        wait_until("a client is served", || {
            let has_ended = child.try_wait().expect("a child").is_some();
            let is_served = nbd_cli(&["info", &uri]).code == Some(0);
            if has_ended && !is_served {
                let mut said = String::new();
                let _ = child.stderr.take().map(|mut error| error.read_to_string(&mut said));
                panic!("round {round}: {said}");
            }
            is_served
        });
    }
    for server in &mut servers {
        wait_until("it ends with its client", || {
            server.0.try_wait().expect("a child").is_some_and(|status| status.success())
        });
    }
}

#[test]
fn clients_one_after_the_other_find_a_place_although_there_is_only_one() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (daemon, started) = Daemon::start(&["-t", "-f", "raw", disk.path()]);
    started.success();
    for _ in 0..20 {
        let said = peer(&qemu_io, &["-f", "raw", "-c", "read 0 4k", &daemon.uri()]);
        assert!(said.contains("read 4096/4096"), "{said}");
    }
}

#[test]
fn a_silent_client_is_cut_after_the_handshake_limit() {
    let disk = Disk::sparse();
    let server =
        Foreground::start(ours(), &["-t", "--handshake-limit=1", "-f", "raw", disk.path()]);
    let mut silent = UnixStream::connect(server.socket()).expect("a connection");
    let mut greeting = Vec::new();
    silent.read_to_end(&mut greeting).expect("an end");
    assert_eq!(greeting.len(), 18, "the greeting, and nothing more");
}

#[test]
fn a_signal_right_after_the_start_is_not_lost() {
    let disk = Disk::sparse();
    let seed = std::process::id();
    eprintln!("seed {seed}");
    for round in 0..30_u32 {
        let mut server = ours();
        server.args(["-t", "-r", "-f", "raw", "-k", &disk.beside("socket"), disk.path()]);
        let mut child = Killed(server.stdout(Stdio::null()).spawn().expect("a program"));
        let pause = seed.wrapping_mul(2_654_435_761).wrapping_add(round * 617) % 12_000;
        std::thread::sleep(std::time::Duration::from_micros(pause.into()));
        kill_process(rustix::process::Pid::from_child(&child.0), Signal::TERM).expect("a child");
        wait_until("it ends", || child.0.try_wait().expect("a child").is_some());
    }
}

#[test]
fn signals_end_it_in_order() {
    let disk = Disk::sparse();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut server = Foreground::start(ours(), &["-t", "-f", "raw", disk.path()]);
        server.signal(signal);
        assert_eq!(server.exit_code(), Some(0), "{}", server.complaints());
        assert!(!std::path::Path::new(server.socket()).exists());
    }
}

#[test]
fn a_socket_of_a_service_manager_is_used_in_the_foreground_and_by_a_daemon() {
    tools!(python = "python3");
    let disk = Disk::sparse();
    for (index, fork) in [&["-e", "4"][..], &["-e", "4", "--fork"]].into_iter().enumerate() {
        let socket = disk.beside(&format!("socket{index}"));
        let mut launcher = started_by_service_manager(&python, &socket, "qemu-nbd");
        launcher.args(["-f", "raw"]).args(fork).arg(disk.path());
        launcher.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = Killed(launcher.spawn().expect("a program"));
        // It ends with its only client.
        wait_until("the socket is there", || std::path::Path::new(&socket).exists());
        let uri = format!("nbd+unix:///?socket={socket}");
        let copy = disk.beside("copy.img");
        nbd_cli(&["copy", &uri, &copy]).success();
        disk.assert_equals(&copy);
        wait_until("it ends", || child.0.try_wait().expect("a child").is_some());
        assert!(child.0.wait().expect("its status").success(), "{fork:?}");
        wait_until("nobody listens", || UnixStream::connect(&socket).is_err());
    }
}

#[test]
fn a_socket_of_a_service_manager_leaves_no_choice_of_address() {
    tools!(python = "python3");
    let disk = Disk::sparse();
    for (index, (option, value, part)) in [
        ("-k", "/tmp/other", "Unix socket"),
        ("-b", "127.0.0.1", "interface"),
        ("-p", "10810", "TCP port"),
        ("-c", "/dev/nbd0", "NBD device"),
    ]
    .into_iter()
    .enumerate()
    {
        let socket = disk.beside(&format!("socket{index}"));
        let mut launcher = started_by_service_manager(&python, &socket, "qemu-nbd");
        let refused = run(launcher.args([option, value, disk.path()]));
        assert_eq!(refused.code, Some(1));
        assert!(refused.stderr.contains(part), "{refused:?}");
    }
}

#[test]
fn the_name_of_a_link_makes_it_qemu_nbd() {
    let disk = Disk::sparse();
    let link = disk.beside("qemu-nbd");
    std::os::unix::fs::symlink(crate::support::PROGRAM, &link).expect("a link");
    let said = run(Command::new(link).arg("--version")).success();
    assert!(said.starts_with("qemu-nbd "), "{said}");
}
