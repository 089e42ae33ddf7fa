//! The mount itself: it begins, and ends when it is unmounted or told to.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::{Config, MountOption, Session, SessionUnmounter};
use rustix::mount::UnmountFlags;
use tokio::sync::oneshot;

use super::disk::MountedDisk;
use super::requests::{MAX_READ, MountedFiles};
use crate::error::{JobError, JobErrorKind};
use crate::tasks;
use crate::text::printable;

const DEVICE: &str = "/dev/fuse";
/// Programs that mount for users.
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];
/// Requests that are carried out at once: what a server or a slow disk has in flight.
const THREADS: usize = 8;

/// A mounted directory. If it is dropped without [`end`](Self::end) the mount goes on until it is
/// unmounted or the process ends.
pub struct Mounted {
    disks: Vec<Arc<MountedDisk>>,
    directory: PathBuf,
    parts: Vec<PathBuf>,
    unmounter: SessionUnmounter,
    ended: oneshot::Receiver<io::Result<()>>,
}

/// Checks what mounting needs.
///
/// # Errors
///
/// With the remedy if something is missing.
pub(super) fn check(directory: &Path) -> Result<(), JobError> {
    let shown = printable(&directory.to_string_lossy());
    let metadata = directory.metadata().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => JobError::destination(format!(
            "the directory '{shown}' does not exist; create it first"
        )),
        _ => JobError::destination(format!("cannot mount on '{shown}': {error}")),
    })?;
    if !metadata.is_dir() {
        return Err(JobError::destination(format!(
            "cannot mount on '{shown}': it is not a directory"
        )));
    }
    let device = std::fs::File::options().read(true).write(true).open(DEVICE);
    device.map_err(|error| {
        JobError::destination(match error.kind() {
            io::ErrorKind::PermissionDenied => format!(
                "cannot open {DEVICE}: {error}; use an account that may, such as root"
            ),
            _ => format!(
                "this system has no {DEVICE}: load the kernel's module with 'modprobe fuse', or give \
                 the container the device (--device {DEVICE})"
            ),
        })
    })?;
    if !rustix::process::geteuid().is_root() && !HELPERS.iter().any(|name| is_installed(name)) {
        return Err(JobError::destination(
            "to mount without being root takes the program fusermount3, which is not installed; \
             install the package fuse3",
        ));
    }
    Ok(())
}

fn is_installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let known = ["/bin", "/usr/bin", "/sbin", "/usr/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(known).any(|directory| directory.join(name).is_file())
}

impl Mounted {
    /// Mounts, and serves the kernel from threads.
    pub(super) fn start(files: MountedFiles, directory: &Path) -> Result<Self, JobError> {
        let failed = |error: &io::Error| {
            let shown = printable(&directory.to_string_lossy());
            let why = error.to_string();
            JobError::destination(format!("cannot mount on '{shown}': {}", why.trim()))
        };
        // A directory that is named relative to the working directory is unmounted later.
        let directory_found = directory.canonicalize().map_err(|error| failed(&error))?;
        let disks = files.disks.clone();
        let parts = files.tree.parts().iter().map(|part| directory.join(part)).collect();
        let is_writable = disks.iter().any(|disk| disk.is_writable());
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("nbd-cli".into()),
            MountOption::Subtype("nbd-cli".into()),
            MountOption::CUSTOM(format!("max_read={MAX_READ}")),
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::NoAtime,
            if is_writable { MountOption::RW } else { MountOption::RO },
        ];
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let session = Session::new(files, &directory_found, &config);
        let mut session = session.map_err(|error| failed(&error))?;
        let unmounter = session.unmount_callable();
        let (sender, ended) = oneshot::channel();
        let run = move || {
            // Without a receiver, no thread waits.
            let _ = sender.send(session.run());
        };
        tasks::start_thread("mount", run).map_err(|error| failed(&error))?;
        Ok(Self { disks, directory: directory_found, parts, unmounter, ended })
    }

    /// The files of the disks and their partitions.
    #[must_use]
    pub fn parts(&self) -> &[PathBuf] {
        &self.parts
    }

    /// Waits until the directory is unmounted by someone else.
    ///
    /// # Errors
    ///
    /// If the connection with the kernel fails.
    ///
    /// # Cancel safety
    ///
    /// Safe; after it was ready it must not be called again.
    pub async fn unmounted(&mut self) -> Result<(), JobError> {
        let lost = |error: &dyn std::fmt::Display| {
            JobError::new(JobErrorKind::Internal, format!("the mount has failed: {error}"))
        };
        let ended = (&mut self.ended).await.map_err(|error| lost(&error))?;
        ended.map_err(|error| lost(&error))
    }

    /// Unmounts the directory, if that has not happened, completes the requests in flight, and
    /// closes the disks: everything that was written is durable then. Programs that still have
    /// files of the directory open get errors from now on; the connection with the kernel ends when
    /// they have closed them, or with the process. Blocks.
    ///
    /// # Errors
    ///
    /// If what was written cannot be made durable, or the directory cannot be unmounted.
    pub fn end(mut self) -> Result<(), JobError> {
        let unmounted = self.unmount();
        let closed: Vec<_> = self.disks.iter().map(|disk| disk.close()).collect();
        for result in closed {
            result.map_err(|error| JobError::image(JobErrorKind::Destination, error))?;
        }
        unmounted
    }

    fn unmount(&mut self) -> Result<(), JobError> {
        if self.unmounter.unmount().is_ok() {
            return Ok(());
        }
        // It is in use: no new files are opened, and those that are open are cut off.
        rustix::mount::unmount(&self.directory, UnmountFlags::DETACH).map_err(|error| {
            let shown = printable(&self.directory.to_string_lossy());
            let error = io::Error::from(error);
            JobError::destination(format!(
                "cannot unmount '{shown}': {error}; run 'umount {shown}'"
            ))
        })
    }
}

impl std::fmt::Debug for Mounted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounted").field("directory", &self.directory).finish_non_exhaustive()
    }
}
