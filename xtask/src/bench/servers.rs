//! The servers that are measured: how each is started, found ready and ended.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::data::DataFile;
use super::rows::{Row, Workload};

/// How long a server may take until it accepts a connection.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// How long a server may take to end after it was asked to.
const END_DEADLINE: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A server in one of its modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Server {
    /// The server of this workspace.
    Ours,
    /// Answers from a constant buffer: what protocol and socket cost on this machine.
    Floor,
    /// qemu-nbd as it comes: write-back cache and a pool of threads.
    QemuNbd,
    /// qemu-nbd with io_uring.
    QemuNbdIoUring,
    /// qemu-nbd with O_DIRECT and Linux's own asynchronous I/O.
    QemuNbdDirect,
    /// nbdkit's file plugin with its 16 threads.
    Nbdkit,
    /// The reference server, nbd-server.
    #[serde(rename = "nbd-server")]
    Reference,
}

impl Server {
    pub(crate) const ALL: &[Self] = &[
        Self::Ours,
        Self::Floor,
        Self::QemuNbd,
        Self::QemuNbdIoUring,
        Self::QemuNbdDirect,
        Self::Nbdkit,
        Self::Reference,
    ];

    /// The name on the command line, in the table and in the report.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Floor => "floor",
            Self::QemuNbd => "qemu-nbd",
            Self::QemuNbdIoUring => "qemu-nbd-io-uring",
            Self::QemuNbdDirect => "qemu-nbd-direct",
            Self::Nbdkit => "nbdkit",
            Self::Reference => "nbd-server",
        }
    }

    /// The program that it runs.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Ours => "nbd-cli",
            Self::Floor => "floor",
            Self::QemuNbd | Self::QemuNbdIoUring | Self::QemuNbdDirect => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
            Self::Reference => "nbd-server",
        }
    }

    /// Whether it is built from this workspace.
    pub(crate) fn is_built(self) -> bool {
        matches!(self, Self::Ours | Self::Floor)
    }

    /// Whether it is what ours is compared with.
    pub(crate) fn is_peer(self) -> bool {
        !self.is_built()
    }

    /// Whether it takes part in `row`: the floor only reads.
    pub(crate) fn serves(self, row: &Row) -> bool {
        self != Self::Floor || matches!(row.workload, Workload::Copy { .. }) || !row.writes()
    }
}

/// Starts servers for one file.
#[derive(Debug)]
pub(crate) struct Launcher<'a> {
    file: &'a DataFile,
    size: u64,
    folder: &'a Path,
    target_folder: PathBuf,
}

impl<'a> Launcher<'a> {
    /// Servers will serve `file`, keep their sockets in `folder`, and come from `target_folder` if
    /// they are built here.
    ///
    /// # Errors
    ///
    /// The file is gone.
    pub(crate) fn new(
        file: &'a DataFile,
        folder: &'a Path,
        target_folder: PathBuf,
    ) -> Result<Self> {
        let size = fs::metadata(file.path()).context("the file to serve")?.len();
        Ok(Self { file, size, folder, target_folder })
    }

    /// The file that is served.
    pub(crate) fn file(&self) -> &DataFile {
        self.file
    }

    /// Starts `server` and waits until it accepts a connection.
    ///
    /// # Errors
    ///
    /// The program is missing, ends at once, or does not listen in time; its complaint is in the
    /// error.
    pub(crate) fn start(&self, server: Server) -> Result<RunningServer> {
        let socket = self.folder.join("nbd.sock");
        // A server that was killed leaves its socket behind.
        drop(fs::remove_file(&socket));
        let log = self.folder.join("server.log");
        let log_file = File::create(&log).with_context(|| log.display().to_string())?;
        let mut command = self.command(server, &socket)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
        let export = if server == Server::Reference { "disk" } else { "" };
        let mut running = RunningServer {
            child,
            daemon: None,
            uri: format!("nbd+unix:///{export}?socket={}", socket.display()),
        };
        let daemon_file = (server == Server::Reference).then(|| self.daemon_file());
        running.wait_until_ready(&socket, daemon_file.as_deref()).map_err(|error| {
            let complaint = fs::read_to_string(&log).unwrap_or_default();
            error.context(complaint.trim().to_owned())
        })?;
        Ok(running)
    }

    fn command(&self, server: Server, socket: &Path) -> Result<Command> {
        let mut command = match server {
            Server::Ours | Server::Floor => {
                Command::new(self.target_folder.join("release").join(server.program()))
            }
            _ => Command::new(server.program()),
        };
        let disk = self.file.path();
        match server {
            Server::Ours => command.arg("serve").arg(disk).arg("--socket").arg(socket),
            Server::Floor => {
                command.arg("--socket").arg(socket).arg("--size").arg(self.size.to_string())
            }
            Server::QemuNbd | Server::QemuNbdIoUring | Server::QemuNbdDirect => {
                match server {
                    Server::QemuNbdIoUring => {
                        command.args(["--cache=writeback", "--aio=io_uring"]);
                    }
                    Server::QemuNbdDirect => {
                        command.args(["--cache=none", "--aio=native"]);
                    }
                    _ => {}
                }
                command.args(["-f", "raw", "-t", "-e", "16", "-k"]).arg(socket).arg(disk)
            }
            Server::Nbdkit => command.args(["-f", "-U"]).arg(socket).arg("file").arg(disk),
            Server::Reference => {
                let settings = self.folder.join("nbd-server.conf");
                fs::write(&settings, nbd_server_settings(socket, disk))
                    .with_context(|| settings.display().to_string())?;
                drop(fs::remove_file(self.daemon_file()));
                // It takes several connections only as a daemon (-d serves one and ends), and
                // writes the daemon's process id to a file.
                command.arg("-C").arg(settings).arg("-p").arg(self.daemon_file())
            }
        };
        Ok(command)
    }

    fn daemon_file(&self) -> PathBuf {
        self.folder.join("nbd-server.pid")
    }
}

fn nbd_server_settings(socket: &Path, disk: &Path) -> String {
    format!(
        "[generic]\nunixsock = {}\nallowlist = false\n[disk]\nexportname = {}\n",
        socket.display(),
        disk.display()
    )
}

/// A server that is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct RunningServer {
    child: Child,
    /// The process that serves, if it is not the child itself.
    daemon: Option<u32>,
    uri: String,
}

impl RunningServer {
    /// The process whose tree does the serving.
    pub(crate) fn root_process(&self) -> u32 {
        self.daemon.unwrap_or_else(|| self.child.id())
    }

    /// Where clients find the disk.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    fn wait_until_ready(&mut self, socket: &Path, daemon_file: Option<&Path>) -> Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        while Instant::now() < deadline {
            if let Some(daemon_file) = daemon_file {
                self.daemon = self.daemon.or_else(|| read_process_id(daemon_file));
            }
            let is_known = daemon_file.is_none() || self.daemon.is_some();
            if is_known && UnixStream::connect(socket).is_ok() {
                // The server gets a moment to see that this connection is gone already.
                thread::sleep(5 * POLL_INTERVAL);
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()?
                && (daemon_file.is_none() || !status.success())
            {
                bail!("ended at once with {status}");
            }
            thread::sleep(POLL_INTERVAL);
        }
        bail!("accepts no connection after {} s", START_DEADLINE.as_secs());
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon {
            signal(daemon, "-TERM");
            wait_for_end(|| !is_alive(daemon));
            if is_alive(daemon) {
                signal(daemon, "-KILL");
            }
        } else if matches!(self.child.try_wait(), Ok(None)) {
            signal(self.child.id(), "-TERM");
            wait_for_end(|| !matches!(self.child.try_wait(), Ok(None)));
        }
        // Nothing is left to do about a child that can be neither killed nor waited for.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Sends a signal by way of kill(1): the standard library can only kill its own children.
fn signal(process: u32, signal: &str) {
    let mut command = Command::new("kill");
    command.args([signal, &process.to_string()]).stderr(Stdio::null());
    if let Err(error) = command.status() {
        eprintln!("bench: cannot end process {process}: {error}");
    }
}

fn wait_for_end(mut has_ended: impl FnMut() -> bool) {
    let deadline = Instant::now() + END_DEADLINE;
    while Instant::now() < deadline && !has_ended() {
        thread::sleep(POLL_INTERVAL);
    }
}

/// Whether the process runs still; a zombie does not.
fn is_alive(process: u32) -> bool {
    fs::read_to_string(format!("/proc/{process}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(") ").map(|(_, rest)| !rest.starts_with(['Z', 'X'])))
        .unwrap_or(false)
}

fn read_process_id(file: &Path) -> Option<u32> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::rows::ROWS;

    #[test]
    fn floor_takes_part_in_rows_that_read_only() {
        let served: Vec<&str> =
            ROWS.iter().filter(|row| Server::Floor.serves(row)).map(|row| row.name).collect();
        assert!(served.contains(&"randread-4k-qd1") && served.contains(&"nbdcopy-c4"));
        assert!(served.iter().all(|name| !name.contains("write")), "{served:?}");
    }

    #[test]
    fn program_that_ends_at_once_is_an_error_and_leaves_nothing() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut running = RunningServer {
            child: Command::new("false").spawn().expect("false starts"),
            daemon: None,
            uri: String::new(),
        };
        let error = running
            .wait_until_ready(&folder.path().join("nbd.sock"), None)
            .expect_err("there is no server");
        assert!(error.to_string().contains("ended at once"), "{error}");
    }

    #[test]
    fn server_ends_when_it_is_dropped() {
        let child = Command::new("sleep").arg("600").spawn().expect("sleep starts");
        let process = child.id();
        assert!(is_alive(process));
        drop(RunningServer { child, daemon: None, uri: String::new() });
        assert!(!is_alive(process));
    }
}
