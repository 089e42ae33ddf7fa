//! `--run`: a command with a private server.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use nbd_server::BoundAddress;
use nbd_server::tls::TlsMode;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::error::CommandError;
use crate::signals::EndSignals;

/// The running command.
#[derive(Debug)]
pub(super) struct Captive {
    child: Child,
}

impl Captive {
    /// Starts the command with the shell.
    pub(super) fn start(
        command: &str,
        bound: &[BoundAddress],
        names: &[String],
        tls: &TlsMode,
    ) -> Result<Self, CommandError> {
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command).env_remove("LISTEN_FDS").env_remove("LISTEN_PID");
        let name = names.first().map(String::as_str).unwrap_or_default();
        shell.env("exportname", name);
        if let Some(address) = bound.first() {
            shell.env("uri", super::tls::uri(address, name, tls).to_string());
        }
        for address in bound {
            match address {
                BoundAddress::Tcp(address) => shell.env("port", address.port().to_string()),
                BoundAddress::Unix(Some(path)) => shell.env("unixsocket", path),
                _ => continue,
            };
        }
        let child = shell.spawn().map_err(|error| {
            CommandError::new(format!("cannot run '{command}' with /bin/sh: {error}"))
        })?;
        Ok(Self { child })
    }

    /// Waits for its end and returns its status like a shell. Signals that ask this process to end
    /// are forwarded to it.
    pub(super) async fn wait(&mut self, signals: &mut EndSignals) -> Result<u8, CommandError> {
        loop {
            let process = self.child.id();
            tokio::select! {
                status = self.child.wait() => {
                    return status.map(exit_code).map_err(|error| {
                        CommandError::new(format!("cannot wait for the command: {error}"))
                    });
                }
                signal = signals.next() => {
                    let pid = process.and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
                    let signal = Signal::from_named_raw(signal.number());
                    if let (Some(pid), Some(signal)) = (pid, signal) {
                        // It may have ended in the meantime.
                        let _ = kill_process(pid, signal);
                    }
                }
            }
        }
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
