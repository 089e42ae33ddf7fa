//! Servers and commands that judges start. Each has a process group of its own, so that Ctrl-C at
//! the terminal ends none of them in the middle of a round.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use super::interrupt;
use crate::command::command_line;

/// Time limit for a server to start or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command that runs longer is considered hung.
const LONGEST_COMMAND: Duration = Duration::from_secs(300);

/// A server under test. It is killed on drop.
#[derive(Debug)]
pub(super) struct Served {
    child: Child,
    complaints: PathBuf,
}

impl Served {
    /// Starts a server and waits for the line with its address.
    ///
    /// # Errors
    ///
    /// It ends, or prints nothing.
    pub(super) fn start(command: &mut Command, directory: &Path, socket: &Path) -> Result<Self> {
        let mut server = Self::spawn(command, directory)?;
        if server.has_started(socket)? {
            return Ok(server);
        }
        let status = wait(&mut server.child, PATIENCE)?;
        bail!("the server did not start: {status:?}: {}", server.complaints());
    }

    /// Starts a server and does not wait.
    ///
    /// # Errors
    ///
    /// There is no such program.
    pub(super) fn spawn(command: &mut Command, directory: &Path) -> Result<Self> {
        let complaints = directory.join("server.txt");
        let log = File::options().create(true).append(true).open(&complaints)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start the server")?;
        Ok(Self { child, complaints })
    }

    /// Waits for the line with the address of a server that was [spawned](Self::spawn); returns
    /// false if it ends instead.
    ///
    /// # Errors
    ///
    /// It does neither.
    pub(super) fn has_started(&mut self, socket: &Path) -> Result<bool> {
        let output = self.child.stdout.take().context("the server has no output")?;
        match first_line(output, PATIENCE) {
            Some(line) => Ok(!line.is_empty() && socket.exists()),
            None => bail!("the server neither starts nor ends: {}", self.complaints()),
        }
    }

    /// Whether the server has ended.
    ///
    /// # Errors
    ///
    /// It cannot be waited for.
    pub(super) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Kills the server, as the kernel does when memory is exhausted.
    pub(super) fn kill(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }

    /// Asks the server to end.
    ///
    /// # Errors
    ///
    /// It does not, or not with status 0.
    pub(super) fn end(mut self) -> Result<()> {
        self.end_now()
    }

    /// As [`end`](Self::end).
    ///
    /// # Errors
    ///
    /// As [`end`](Self::end).
    pub(super) fn end_now(&mut self) -> Result<()> {
        let id = Pid::from_child(&self.child);
        rustix::process::kill_process(id, Signal::TERM)?;
        match wait(&mut self.child, PATIENCE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the server ended with {status}: {}", self.complaints()),
            None => bail!("the server does not end: {}", self.complaints()),
        }
    }

    /// Waits until the server has ended by itself.
    ///
    /// # Errors
    ///
    /// It does not, or not with status 0.
    pub(super) fn ended(&mut self) -> Result<()> {
        match wait(&mut self.child, PATIENCE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the server ended with {status}: {}", self.complaints()),
            None => bail!("the server does not end by itself: {}", self.complaints()),
        }
    }

    /// The largest resident size so far, in KiB.
    ///
    /// # Errors
    ///
    /// The server has ended.
    pub(super) fn peak_memory_kib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let value = line.and_then(|line| line.trim().strip_suffix("kB"));
        let value = value.and_then(|value| value.trim().parse().ok());
        value.with_context(|| format!("the server is gone: {}", self.complaints()))
    }

    /// Returns the server's standard error.
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

/// Returns the first line of a server's output; `None` if there is none for so long.
pub(super) fn first_line(output: ChildStdout, patience: Duration) -> Option<String> {
    let (sender, receiver) = mpsc::channel();
    // This thread ends with the server, which is killed at the latest when the caller gives up on
    // it.
    thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(output).read_line(&mut line);
        sender.send(read.map(|_| line).unwrap_or_default()).ok();
    });
    receiver.recv_timeout(patience).ok()
}

/// Waits for the end of a process; returns `None` if it had to be killed.
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
        if Instant::now() >= end || interrupt::is_immediate() {
            // With what it has started.
            kill_process_group(Pid::from_child(child), Signal::KILL).ok();
            child.kill().ok();
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// The outcome of a command.
#[derive(Debug)]
pub(super) struct Ended {
    /// `None` if it had to be killed.
    pub(super) status: Option<ExitStatus>,
    pub(super) said: String,
}

impl Ended {
    /// Whether it ended with status 0.
    pub(super) fn is_success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }
}

/// Runs a command to its end, or kills it after `patience`.
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
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let status = wait(&mut child, patience)?;
    Ok(Ended { status, said: String::from_utf8_lossy(&fs::read(said)?).into_owned() })
}

/// Runs a command that must succeed, and returns what it wrote to standard output.
///
/// # Errors
///
/// It cannot be started, ends with another status than 0, or does not end.
pub(super) fn output_of(command: &mut Command) -> Result<String> {
    output_if(command, &[0])
}

/// Like [`output_of`], for a command that may end with one of these statuses.
///
/// # Errors
///
/// It cannot be started, ends with another status, or does not end.
pub(super) fn output_if(command: &mut Command, statuses: &[i32]) -> Result<String> {
    let line = command_line(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let output = child.stdout.take().map(|mut pipe| thread::spawn(move || read_all(&mut pipe)));
    let complaint = child.stderr.take().map(|mut pipe| thread::spawn(move || read_all(&mut pipe)));
    let status = wait(&mut child, LONGEST_COMMAND)?;
    let [output, complaint] =
        [output, complaint].map(|it| it.and_then(|it| it.join().ok()).unwrap_or_default());
    let Some(status) = status else { bail!("`{line}` hangs: {}", complaint.trim()) };
    match status.code() {
        Some(code) if statuses.contains(&code) => Ok(output),
        _ => bail!("`{line}`: {status}: {}", complaint.trim()),
    }
}

/// Runs `qemu-img check` on an image after its server has ended. Only leaks are allowed.
///
/// # Errors
///
/// It finds anything worse.
pub(super) fn check_image(image: &Path) -> Result<()> {
    let mut check = Command::new("qemu-img");
    output_if(check.args(["check", "-q", "-f", "qcow2"]).arg(image), &[0, 3]).map(drop)
}

fn read_all(pipe: &mut dyn Read) -> String {
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes).ok();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_says_what_it_wrote_and_why_it_failed() {
        let said = output_of(Command::new("sh").args(["-c", "echo right"])).expect("status 0");
        assert_eq!(said, "right\n");
        let error = output_of(Command::new("sh").args(["-c", "echo broken >&2; exit 3"]));
        let error = format!("{:#}", error.expect_err("status 3"));
        assert!(error.contains("exit status: 3: broken"), "{error}");
    }

    #[test]
    fn a_process_that_does_not_end_is_killed() {
        let mut child = Command::new("sleep").arg("1000").spawn().expect("sleep");
        let ended = wait(&mut child, Duration::from_millis(20)).expect("waited");
        assert_eq!(ended, None);
        assert!(child.try_wait().expect("waited").is_some(), "it is gone");
    }
}
