//! Servers that end with the test.

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::PROGRAM;

/// How long anything may take to start or to end. Only a hang takes that long.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running server; killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    uris: Vec<String>,
    socket: PathBuf,
    _directory: Option<TempDir>,
    _stdout: Option<BufReader<ChildStdout>>,
}

impl Server {
    /// `nbd-cli serve` on a unix socket.
    pub(crate) fn ours(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("socket");
        let mut command = Command::new(PROGRAM);
        command.arg("serve").arg("--socket").arg(&socket).args(arguments);
        let mut server = Self::start(&mut command, socket);
        server._directory = Some(directory);
        server
    }

    /// A program that prints its URI when it is ready, as `nbd-cli serve` does.
    pub(crate) fn start(command: &mut Command, socket: PathBuf) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("serve");
        let mut stdout = BufReader::new(child.stdout.take().expect("its output"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("text");
        assert!(line.starts_with("nbd"), "the server did not start: {line:?}");
        let uris = vec![line.trim_end().to_owned()];
        Self { child, uris, socket, _directory: None, _stdout: Some(stdout) }
    }

    /// Another program that serves on the unix socket it is told by `arguments`.
    fn other(tool: &Path, arguments: impl FnOnce(&str, &mut Command), name: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("socket");
        let text = socket.to_str().expect("a plain name");
        let mut command = Command::new(tool);
        arguments(text, &mut command);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("serve");
        let uris = vec![format!("nbd+unix:///{name}?socket={text}")];
        let mut server = Self { child, uris, socket, _directory: Some(directory), _stdout: None };
        server.wait_until_ready();
        server
    }

    /// qemu-nbd with an export of that name.
    pub(crate) fn qemu_nbd(tool: &Path, name: &str, arguments: &[&str]) -> Self {
        let command = |socket: &str, command: &mut Command| {
            command.args(["-t", "-e", "8", "-k", socket, "-x", name]).args(arguments);
        };
        Self::other(tool, command, name)
    }

    /// As `qemu_nbd`, where another server has listened before.
    pub(crate) fn qemu_nbd_at(tool: &Path, name: &str, socket: &Path, more: &[&str]) -> Self {
        let text = socket.to_str().expect("a plain name");
        let mut command = Command::new(tool);
        command.args(["-t", "-e", "8", "-k", text, "-x", name]).args(more);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("serve");
        let uris = vec![format!("nbd+unix:///{name}?socket={text}")];
        let socket = socket.to_owned();
        let mut server = Self { child, uris, socket, _directory: None, _stdout: None };
        server.wait_until_ready();
        server
    }

    /// nbdkit with any plugin and filters.
    pub(crate) fn nbdkit(tool: &Path, arguments: &[&str]) -> Self {
        let command = |socket: &str, command: &mut Command| {
            command.args(["-f", "--exit-with-parent", "-U", socket]).args(arguments);
        };
        Self::other(tool, command, "")
    }

    /// The reference server with one export. It takes several connections only as a daemon.
    pub(crate) fn nbd_server(tool: &Path, name: &str, image: &str) -> Self {
        let configuration = |socket: &str, command: &mut Command| {
            let beside = |name| Path::new(socket).with_file_name(name);
            let text = format!("[generic]\nunixsock = {socket}\n[{name}]\nexportname = {image}\n");
            std::fs::write(beside("config"), text).expect("a configuration");
            command.arg("-C").arg(beside("config")).arg("-p").arg(beside("pid"));
        };
        Self::other(tool, configuration, name)
    }

    /// The process number that a daemon leaves beside its socket.
    fn daemon(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.socket.with_file_name("pid")).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    }

    fn wait_until_ready(&mut self) {
        let start = Instant::now();
        // A connection that is closed at once is harmless to all of these servers.
        while UnixStream::connect(&self.socket).is_err() {
            let failed = self.child.try_wait().expect("a child").filter(|end| !end.success());
            assert_eq!(failed, None, "the server did not start");
            assert!(start.elapsed() < PATIENCE, "the server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The (first) export's URI.
    pub(crate) fn uri(&self) -> &str {
        &self.uris[0]
    }

    /// The URI of another export on the same socket.
    pub(crate) fn uri_of(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("a running server");
    }

    /// Waits for the end.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks for an orderly end and checks that it came.
    #[track_caller]
    pub(crate) fn end(mut self) {
        self.signal(Signal::TERM);
        assert_eq!(self.wait().code(), Some(0));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(daemon) = self.daemon() {
            let _ = kill_process(daemon, Signal::TERM);
        }
    }
}
