//! A Ceph on loopback, with everything in one directory.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::geteuid;

use super::served;
use crate::ceph::Unpacked;
use crate::command::output_of;

/// Starts the daemons, waits for the end of its input, and ends them.
const SCRIPT: &str = include_str!("cluster.sh");

/// How long the daemons may take to start. They take 20 s on two free cores.
const PATIENCE: Duration = Duration::from_secs(300);
/// The user without rights, for judges that root runs.
const NOBODY: u32 = 65534;
const KEY_ID: &str = "AKIATESTKEY";
const SECRET: &str = "s3cr3t of the tests";

/// A running cluster. Its daemons end when it is dropped, and also if this program is killed.
#[derive(Debug)]
pub(super) struct Cluster {
    script: Child,
    directory: PathBuf,
    gateway: u16,
}

impl Cluster {
    /// Starts a cluster, with the bucket `bucket` and the pool `rbd`.
    ///
    /// # Errors
    ///
    /// A daemon does not start.
    pub(super) fn start(ceph: &Unpacked) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("ceph").tempdir()?;
        let Unpacked { tree, modules } = for_anyone(ceph, directory.path())?;
        let [monitor, old_monitor, gateway] = free_ports()?;
        let ports = [monitor, old_monitor, gateway].map(|port| port.to_string());
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT, "sh"]).arg(&tree).arg(&modules).args(ports);
        command.env("AWS_ACCESS_KEY_ID", KEY_ID).env("AWS_SECRET_ACCESS_KEY", SECRET);
        // Signals of the terminal are for the rounds.
        command.current_dir(&directory).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if geteuid().is_root() {
            std::os::unix::fs::chown(&directory, Some(NOBODY), Some(NOBODY))?;
            command.uid(NOBODY).gid(NOBODY);
        }
        let mut script = command.spawn().context("cannot start a shell")?;
        let output = script.stdout.take().context("the shell has no output")?;
        // The script removes it.
        let mut cluster = Self { script, directory: directory.keep(), gateway };
        match served::first_line(output, PATIENCE).as_deref() {
            Some("ready\n") => Ok(cluster),
            ended => {
                let said = cluster.log("start");
                cluster.end();
                bail!("Ceph does not start ({ended:?}): {said}")
            }
        }
    }

    /// Gives a program the addresses and the keys: the gateway to the tests of real stores, and the
    /// pool to programs of Ceph and to qemu-nbd.
    ///
    /// # Errors
    ///
    /// The search path is not UTF-8.
    pub(super) fn allow(&self, command: &mut Command) -> Result<()> {
        let path = std::env::var("PATH").context("PATH")?;
        command.env("PATH", format!("{}:{path}", self.directory.join("bin").display()));
        command.env("NBD_TEST_STORE", format!("http://127.0.0.1:{}", self.gateway));
        command.env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.gateway));
        command.env("AWS_ACCESS_KEY_ID", KEY_ID).env("AWS_SECRET_ACCESS_KEY", SECRET);
        command.env("NBD_TEST_RBD", "rbd");
        Ok(())
    }

    /// The end of a file that the script, or a daemon, has written.
    pub(super) fn log(&self, name: &str) -> String {
        let text = fs::read(self.directory.join(format!("{name}.log"))).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(8000)..]);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn end(&mut self) {
        // The script waits for that.
        drop(self.script.stdin.take());
        served::wait(&mut self.script, PATIENCE).ok();
        // If it was killed, with its daemons, because the run was interrupted.
        fs::remove_dir_all(&self.directory).ok();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.end();
    }
}

fn free_ports() -> Result<[u16; 3]> {
    let mut listeners = Vec::new();
    let mut ports = [0; 3];
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

/// The programs where another user can run them: directories of this user may be closed to others.
fn for_anyone(ceph: &Unpacked, directory: &Path) -> Result<Unpacked> {
    if !geteuid().is_root() {
        return Ok(ceph.clone());
    }
    fs::set_permissions(directory, PermissionsExt::from_mode(0o755))?;
    let is_open = |path: &Path| path.metadata().is_ok_and(|it| it.mode() & 0o005 == 0o005);
    if ceph.tree.ancestors().all(is_open) {
        return Ok(ceph.clone());
    }
    let tree = directory.join("tree");
    let copy = |how| output_of(Command::new("cp").arg(how).arg(&ceph.tree).arg(&tree));
    copy("-al").or_else(|_| {
        let _ = fs::remove_dir_all(&tree);
        copy("-a")
    })?;
    let modules = match ceph.modules.strip_prefix(&ceph.tree) {
        Ok(inside) => tree.join(inside),
        Err(_) => ceph.modules.clone(),
    };
    Ok(Unpacked { tree, modules })
}
