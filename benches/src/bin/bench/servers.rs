//! The servers that serve the raw file: how each is started.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::data::DataFile;
use super::rows::{Row, Workload};
use super::running::RunningServer;

/// A server in one of its modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Server {
    /// The server of this workspace.
    Ours,
    /// Answers from a constant buffer: the cost of protocol and socket on this machine.
    Floor,
    /// qemu-nbd with its defaults: write-back cache and a pool of threads.
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

    /// Returns whether it is compared with ours.
    pub(crate) fn is_peer(self) -> bool {
        !self.is_built()
    }

    /// Whether its writes make the page cache lose what it has of the file.
    pub(crate) fn bypasses_page_cache(self) -> bool {
        self == Self::QemuNbdDirect
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
    directory: &'a Path,
    target_directory: PathBuf,
}

impl<'a> Launcher<'a> {
    /// Servers will serve `file`, keep their sockets in `directory`, and come from
    /// `target_directory` if they are built here.
    ///
    /// # Errors
    ///
    /// The file no longer exists.
    pub(crate) fn new(
        file: &'a DataFile,
        directory: &'a Path,
        target_directory: PathBuf,
    ) -> Result<Self> {
        let size = fs::metadata(file.path()).context("the file to serve")?.len();
        Ok(Self { file, size, directory, target_directory })
    }

    /// The program of this workspace.
    pub(crate) fn nbd_cli(&self) -> Command {
        Command::new(self.target_directory.join("dist").join("nbd-cli"))
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
        let socket = self.directory.join("nbd.sock");
        let command = self.command(server, &socket)?;
        let daemon_file = (server == Server::Reference).then(|| self.daemon_file());
        let export = if server == Server::Reference { "disk" } else { "" };
        RunningServer::start(command, &socket, export, daemon_file.as_deref())
    }

    fn command(&self, server: Server, socket: &Path) -> Result<Command> {
        let mut command = match server {
            Server::Ours | Server::Floor => {
                Command::new(self.target_directory.join("dist").join(server.program()))
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
                command.args(["-f", "raw", "-t", "-e", "32", "-k"]).arg(socket).arg(disk)
            }
            Server::Nbdkit => command.args(["-f", "-U"]).arg(socket).arg("file").arg(disk),
            Server::Reference => {
                let settings = self.directory.join("nbd-server.conf");
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
        self.directory.join("nbd-server.pid")
    }
}

fn nbd_server_settings(socket: &Path, disk: &Path) -> String {
    format!(
        "[generic]\nunixsock = {}\nallowlist = false\n[disk]\nexportname = {}\n",
        socket.display(),
        disk.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::ROWS;

    #[test]
    fn floor_takes_part_in_rows_that_read_only() {
        let served: Vec<&str> =
            ROWS.iter().filter(|row| Server::Floor.serves(row)).map(|row| row.name).collect();
        assert!(served.contains(&"randread-4k-qd1") && served.contains(&"nbdcopy-c4"));
        assert!(served.iter().all(|name| !name.contains("write")), "{served:?}");
    }
}
