//! Disks that are mounted while a test runs.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::in_foreground;
use super::qemu_nbd::wait_until;

/// Returns whether this system can mount. Containers often have no FUSE, so tests without it pass
/// in continuous integration too.
pub(crate) fn can_mount() -> bool {
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse");
    if let Err(error) = device {
        eprintln!("skipped: /dev/fuse cannot be used: {error}");
        return false;
    }
    // A container may have the device and forbid to mount.
    let directory = tempfile::tempdir().expect("a directory");
    let tried = rustix::process::geteuid().is_root().then(|| {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "none"]).arg(directory.path());
        let is_mounted = mount.output().is_ok_and(|output| output.status.success());
        is_mounted && Command::new("umount").arg(directory.path()).status().is_ok()
    });
    if tried == Some(false) {
        eprintln!("skipped: nothing can be mounted here");
    }
    tried != Some(false)
}

/// `nbd-cli mount` on a directory of its own.
#[derive(Debug)]
pub(crate) struct Mount {
    child: Child,
    directory: TempDir,
}

impl Mount {
    /// Mounts, and waits until the disks can be used.
    pub(crate) fn new(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut command = in_foreground();
        command.arg("mount").args(arguments).arg(directory.path());
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("nbd-cli");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("its output");
        BufReader::new(stdout).read_line(&mut line).expect("text");
        let mut mount = Self { child, directory };
        if !line.starts_with(mount.directory.path().to_str().expect("a plain name")) {
            let (status, stderr) = mount.wait();
            panic!("not mounted: {line:?} {status} {stderr}");
        }
        mount
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// Unmounts as an administrator does, and waits for the end of the program.
    #[track_caller]
    pub(crate) fn unmount(mut self) {
        unmount(self.directory.path());
        let (status, stderr) = self.wait();
        assert!(status.success(), "{status}: {stderr}");
    }

    /// Waits for the end of the program, and returns what it said.
    pub(crate) fn wait(&mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        let stderr = self.child.stderr.take();
        stderr.expect("once").read_to_string(&mut said).expect("text");
        (self.child.wait().expect("its end"), said)
    }

    /// Returns whether the directory is still mounted on.
    pub(crate) fn is_mounted(&self) -> bool {
        is_mounted(self.directory.path())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let detach = rustix::mount::UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(self.directory.path(), detach);
    }
}

/// Unmounts a directory. A process that another test starts has the open files of this one for a
/// moment.
pub(crate) fn unmount(directory: &Path) {
    let flags = rustix::mount::UnmountFlags::empty();
    wait_until("nothing uses it", || rustix::mount::unmount(directory, flags).is_ok());
}

/// Returns whether a directory is mounted on.
pub(crate) fn is_mounted(directory: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/mounts").expect("Linux");
    let directory = directory.to_str().expect("a plain name");
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(directory))
}
