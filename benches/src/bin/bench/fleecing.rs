//! Servers that export the state of a disk at one moment: ours with its control socket, and
//! qemu-storage-daemon, which backs up overwritten data into a temporary image.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::lab::Lab;
use super::process::run_to_end;
use super::running::RunningServer;
use crate::command::output_of;

/// The kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Maker {
    Ours,
    Qemu,
}

/// A server of one qcow2 image, its default export.
#[derive(Debug)]
pub(crate) struct Fleecing {
    maker: Maker,
    pub(crate) running: RunningServer,
    program: PathBuf,
    /// The address of the control connection.
    control: PathBuf,
    socket: PathBuf,
    disk: PathBuf,
    /// QEMU's temporary image.
    overlay: PathBuf,
}

const VIEW: &str = "view";

impl Fleecing {
    /// Starts a server of the image `disk`.
    ///
    /// # Errors
    ///
    /// It is missing or does not start.
    pub(crate) fn start(maker: Maker, lab: &Lab<'_>, disk: &str) -> Result<Self> {
        let (socket, control) = (lab.socket(), lab.file("control.sock"));
        let (disk, overlay) = (lab.file(disk), lab.file("overlay.qcow2"));
        // A killed server leaves its socket behind.
        drop(std::fs::remove_file(&control));
        let command = match maker {
            Maker::Ours => ours(lab, &control, &disk),
            Maker::Qemu => qemu(&socket, &control, &disk),
        };
        let running = RunningServer::start(command, &socket, "", None)?;
        let program = lab.nbd_cli().get_program().into();
        Ok(Self { maker, running, program, control, socket, disk, overlay })
    }

    /// Prepares a checkpoint; this is not part of its cost.
    ///
    /// # Errors
    ///
    /// QEMU's temporary image cannot be made.
    pub(crate) fn prepare(&self, size: u64) -> Result<()> {
        if self.maker == Maker::Ours {
            return Ok(());
        }
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&self.disk);
        output_of(create.arg(&self.overlay).arg(size.to_string())).map(drop)
    }

    /// Starts a checkpoint. Call [`prepare`](Self::prepare) first.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub(crate) fn begin(&self) -> Result<()> {
        if self.maker == Maker::Ours {
            return self.say(&["checkpoint-start", "", "--view", VIEW]);
        }
        let file = json!({"driver": "file", "filename": self.overlay});
        Qmp::connect(&self.control)?.run(&[
            (
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": "overlay", "file": file, "backing": "disk"}),
            ),
            (
                "blockdev-backup",
                json!({"job-id": "job", "device": "disk", "target": "overlay", "sync": "none"}),
            ),
            (
                "block-export-add",
                json!({"type": "nbd", "id": VIEW, "node-name": "overlay", "name": VIEW}),
            ),
        ])
    }

    /// Starts a checkpoint with a bitmap of the image, whose bits the view has.
    ///
    /// # Errors
    ///
    /// The server refuses, or it is QEMU's, which would need a transaction of five parts.
    pub(crate) fn begin_with_bitmap(&self, bitmap: &str) -> Result<()> {
        match self.maker {
            Maker::Ours => self.say(&["checkpoint-start", "", "--view", VIEW, "--bitmap", bitmap]),
            Maker::Qemu => self.begin(),
        }
    }

    /// Ends the checkpoint. QEMU's ends with the server.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub(crate) fn end(&self) -> Result<()> {
        match self.maker {
            Maker::Ours => self.say(&["checkpoint-end", "", "success"]),
            Maker::Qemu => Ok(()),
        }
    }

    /// Returns the address of the checkpoint's view.
    pub(crate) fn view_uri(&self) -> String {
        format!("nbd+unix:///{VIEW}?socket={}", self.socket.display())
    }

    fn say(&self, words: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.program);
        run_to_end(command.arg("control").arg(&self.control).args(words)).map(drop)
    }
}

fn ours(lab: &Lab<'_>, control: &Path, disk: &Path) -> Command {
    let mut command = lab.nbd_cli();
    // Overwritten data goes to the directory of the image, as with QEMU's overlay.
    command.env("TMPDIR", lab.directory);
    command.args(["serve", "--format", "qcow2", "--control"]).arg(control);
    command.arg(disk).arg("--socket").arg(lab.socket());
    command
}

fn qemu(socket: &Path, control: &Path, disk: &Path) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    let control = control.display();
    command.args(["--chardev", &format!("socket,id=qmp,path={control},server=on,wait=off")]);
    command.args(["--monitor", "chardev=qmp"]);
    let file = format!("driver=file,node-name=file,filename={}", disk.display());
    command.args(["--blockdev", &file, "--blockdev", "driver=qcow2,node-name=disk,file=file"]);
    command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())]);
    command.args(["--export", "type=nbd,id=disk,node-name=disk,name=,writable=on"]);
    command
}

/// A connection to a QEMU monitor.
struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).context("qemu-storage-daemon's monitor")?;
        let mut monitor = Self { stream: BufReader::new(stream) };
        // Its greeting.
        monitor.line()?;
        monitor.run(&[("qmp_capabilities", json!({}))])?;
        Ok(monitor)
    }

    fn run(&mut self, commands: &[(&str, Value)]) -> Result<()> {
        for (command, arguments) in commands {
            let request = json!({"execute": command, "arguments": arguments});
            self.stream.get_mut().write_all(format!("{request}\n").as_bytes())?;
            let reply = loop {
                let line = self.line()?;
                if line.get("event").is_none() {
                    break line;
                }
            };
            if reply.get("return").is_none() {
                bail!("qemu-storage-daemon: {command}: {reply}");
            }
        }
        Ok(())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monitor_is_asked_in_turn_and_its_events_and_errors_are_told_apart() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let replies = concat!(
            "{\"event\": \"JOB_STATUS_CHANGE\"}\n{\"return\": {}}\n",
            "{\"error\": {\"desc\": \"no such node\"}}\n",
        );
        (&theirs).write_all(replies.as_bytes()).expect("room");
        let mut monitor = Qmp { stream: BufReader::new(ours) };
        monitor.run(&[("one", json!({}))]).expect("a return");
        let error = monitor.run(&[("two", json!({}))]).expect_err("an error");
        assert!(error.to_string().contains("no such node"), "{error}");
    }
}
