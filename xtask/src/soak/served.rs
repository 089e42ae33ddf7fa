//! Servers and commands that judges start.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The longest time that a server may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server under judgement. It is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Served {
    child: Child,
    complaints: PathBuf,
}

impl Served {
    /// Starts a server and waits for the line that says where it listens.
    ///
    /// # Errors
    ///
    /// It ends, or says nothing.
    pub(super) fn start(command: &mut Command, folder: &Path, socket: &Path) -> Result<Self> {
        let complaints = folder.join("server.txt");
        let log = File::options().create(true).append(true).open(&complaints)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot start the server")?;
        let mut server = Self { child, complaints };
        let output = server.child.stdout.take().context("the server has no output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        if line.is_empty() || !socket.exists() {
            let status = wait(&mut server.child, PATIENCE)?;
            bail!("the server did not start: {status:?}: {}", server.complaints());
        }
        Ok(server)
    }

    /// Ends the server as the kernel does when memory runs out.
    pub(super) fn kill(mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }

    /// Asks the server to end.
    ///
    /// # Errors
    ///
    /// It does not, or not with status 0.
    pub(super) fn end(mut self) -> Result<()> {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, rustix::process::Signal::TERM)?;
        match wait(&mut self.child, PATIENCE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the server ended with {status}: {}", self.complaints()),
            None => bail!("the server does not end: {}", self.complaints()),
        }
    }

    /// The largest resident size so far, in KiB.
    ///
    /// # Errors
    ///
    /// The server is gone.
    pub(super) fn peak_memory_kib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let value = line.and_then(|line| line.trim().strip_suffix("kB"));
        let value = value.and_then(|value| value.trim().parse().ok());
        value.with_context(|| format!("the server is gone: {}", self.complaints()))
    }

    /// What the server said to standard error.
    pub(super) fn complaints(&self) -> String {
        let text = fs::read_to_string(&self.complaints).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Waits for the end of a process; nothing if it had to be killed.
///
/// # Errors
///
/// It cannot be waited for.
pub(super) fn wait(child: &mut Child, patience: Duration) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            child.kill().ok();
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// How a command ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// Nothing if it had to be killed.
    pub(super) status: Option<ExitStatus>,
    pub(super) said: String,
}

impl Ended {
    /// Whether it ended with status 0.
    pub(super) fn is_success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }
}

/// Runs a command to its end, or for as long as `patience`.
///
/// # Errors
///
/// It cannot be started.
pub(super) fn run(command: &mut Command, said: &Path, patience: Duration) -> Result<Ended> {
    let output = File::create(said)?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let status = wait(&mut child, patience)?;
    Ok(Ended { status, said: String::from_utf8_lossy(&fs::read(said)?).into_owned() })
}
