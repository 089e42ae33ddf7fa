//! Both qemu-nbd: ours, and QEMU's own.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;

use super::{Outcome, PROGRAM, run};

/// How long anything may take. Only a hang takes that long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Our program with qemu-nbd's command line.
pub(crate) fn ours() -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("qemu-nbd");
    command
}

/// Runs ours to its end.
#[track_caller]
pub(crate) fn qemu_nbd(arguments: &[&str]) -> Outcome {
    run(ours().args(arguments))
}

#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "this never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A child that is killed when dropped.
#[derive(Debug)]
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server in the foreground on a unix socket; killed when dropped.
#[derive(Debug)]
pub(crate) struct Foreground {
    pub(crate) child: Child,
    socket: PathBuf,
    _directory: TempDir,
}

impl Foreground {
    /// Starts `program` with these arguments and waits until it listens.
    #[track_caller]
    pub(crate) fn start(mut program: Command, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("socket");
        program.arg("-k").arg(&socket).args(arguments).stdin(Stdio::null());
        let complaints = File::create(directory.path().join("stderr")).expect("a file");
        let child = program.stdout(Stdio::null()).stderr(complaints).spawn().expect("a program");
        let mut server = Self { child, socket, _directory: directory };
        wait_until("it listens", || {
            assert_eq!(server.child.try_wait().expect("a child"), None, "{}", server.complaints());
            UnixStream::connect(&server.socket).is_ok()
        });
        server
    }

    /// What it has written to standard error.
    pub(crate) fn complaints(&self) -> String {
        std::fs::read_to_string(self.socket.with_file_name("stderr")).expect("text")
    }

    pub(crate) fn socket(&self) -> &str {
        self.socket.to_str().expect("a plain name")
    }

    /// The URI of an export.
    pub(crate) fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a running server");
    }

    /// Waits for the end and returns the exit code.
    #[track_caller]
    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let mut code = None;
        wait_until("it ends", || {
            code = self.child.try_wait().expect("a child");
            code.is_some()
        });
        code.and_then(|status| status.code())
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server in the background, started as scripts do it; ended when dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    directory: TempDir,
}

impl Daemon {
    /// Runs `--fork` with a socket and a pid file; the caller checks the outcome.
    pub(crate) fn start(arguments: &[&str]) -> (Self, Outcome) {
        let directory = tempfile::tempdir().expect("a directory");
        let daemon = Self { directory };
        let mut command = ours();
        command.arg("--fork").arg("--pid-file").arg(daemon.pid_file());
        let outcome = run(command.arg("-k").arg(daemon.socket()).args(arguments));
        (daemon, outcome)
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.directory.path().join("pid")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    /// What the pid file says.
    #[track_caller]
    pub(crate) fn pid(&self) -> Pid {
        read_pid(&self.pid_file()).expect("a process number and a line end")
    }

    pub(crate) fn is_running(&self) -> bool {
        test_kill_process(self.pid()).is_ok()
    }

    #[track_caller]
    pub(crate) fn wait_for_end(&self) {
        wait_until("the daemon ends", || !self.is_running());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(pid) = read_pid(&self.pid_file()) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn read_pid(path: &Path) -> Option<Pid> {
    let text = std::fs::read_to_string(path).ok()?;
    Pid::from_raw(text.strip_suffix('\n')?.parse().ok()?)
}
