//! A server as a child process: starts it, waits until it is ready, and ends it.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::ending;

/// Time limit for a server to accept a connection.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// Time limit for a server to end after a request.
const END_DEADLINE: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A server that is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct RunningServer {
    child: Child,
    /// The process that serves, if it is not the child itself.
    daemon: Option<u32>,
    uri: String,
}

impl RunningServer {
    /// Starts `command`, which listens on `socket` and calls its disk `export`, and waits until it
    /// accepts a connection. The server is not the child itself if it writes its process id to
    /// `daemon_file`.
    ///
    /// # Errors
    ///
    /// The program is missing, ends at once, or does not listen in time; its complaint is in the
    /// error.
    pub(crate) fn start(
        mut command: Command,
        socket: &Path,
        export: &str,
        daemon_file: Option<&Path>,
    ) -> Result<Self> {
        ending::stop_if_ending();
        // A server that was killed leaves its socket behind.
        drop(fs::remove_file(socket));
        let log = socket.with_extension("log");
        let log_file = File::create(&log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
        let mut running = Self {
            child,
            daemon: None,
            uri: format!("nbd+unix:///{export}?socket={}", socket.display()),
        };
        running.wait_until_ready(socket, daemon_file).map_err(|error| {
            let complaint = fs::read_to_string(&log).unwrap_or_default();
            error.context(complaint.trim().to_owned())
        })?;
        Ok(running)
    }

    /// The process whose tree does the serving.
    pub(crate) fn root_process(&self) -> u32 {
        self.daemon.unwrap_or_else(|| self.child.id())
    }

    /// Returns the URI of the disk.
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
                // Gives the server a moment to notice that this connection has closed.
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
        // There is no remedy for a child that can be neither killed nor waited for.
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

/// Asks processes to end, and kills those that do not in time.
pub(crate) fn end_all(processes: &[u32]) {
    for process in processes {
        signal(*process, "-TERM");
    }
    wait_for_end(|| !processes.iter().any(|process| is_alive(*process)));
    for process in processes.iter().filter(|process| is_alive(**process)) {
        signal(*process, "-KILL");
    }
}

fn wait_for_end(mut has_ended: impl FnMut() -> bool) {
    let deadline = Instant::now() + END_DEADLINE;
    while Instant::now() < deadline && !has_ended() {
        thread::sleep(POLL_INTERVAL);
    }
}

/// Returns whether the process still runs; a zombie does not.
pub(crate) fn is_alive(process: u32) -> bool {
    fs::read_to_string(format!("/proc/{process}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(") ").map(|(_, rest)| !rest.starts_with(['Z', 'X'])))
        .unwrap_or(false)
}

pub(crate) fn read_process_id(file: &Path) -> Option<u32> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_that_ends_at_once_is_an_error_and_leaves_nothing() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let mut running = RunningServer {
            child: Command::new("false").spawn().expect("false starts"),
            daemon: None,
            uri: String::new(),
        };
        let error = running
            .wait_until_ready(&directory.path().join("nbd.sock"), None)
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
