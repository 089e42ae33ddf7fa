//! A private directory for sockets and files.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use crate::error::{JobError, JobErrorKind};

/// A directory that only this user can enter, with a socket or a temporary overlay in it; removed
/// on drop.
#[derive(Debug)]
pub struct PrivateDirectory {
    path: PathBuf,
}

impl PrivateDirectory {
    /// Creates a directory in that of the system for temporary files.
    ///
    /// # Errors
    ///
    /// If it cannot be created.
    pub fn new() -> Result<Self, JobError> {
        Self::inside(&std::env::temp_dir())
    }

    /// Creates a directory in `parent`.
    ///
    /// # Errors
    ///
    /// If it cannot be created.
    pub fn inside(parent: &Path) -> Result<Self, JobError> {
        let mut last = None;
        // Another process with our number in another namespace may have left one.
        for attempt in 0..100 {
            let path = parent.join(format!("nbd-cli-{}-{attempt}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => last = Some(error),
                Err(error) => {
                    last = Some(error);
                    break;
                }
            }
        }
        let why = last.map(|error| error.to_string()).unwrap_or_default();
        Err(JobError::new(
            JobErrorKind::Destination,
            format!(
                "cannot create a private directory in '{}': {why}; set TMPDIR to a directory you may write to",
                parent.display()
            ),
        ))
    }

    /// Returns the path of a temporary overlay, which does not stay there.
    pub(super) fn overlay(&self) -> PathBuf {
        self.path.join("overlay.qcow2")
    }

    /// Returns the path of the socket.
    pub fn socket(&self) -> PathBuf {
        self.path.join("socket")
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        // The server has removed its socket before; there are no other files.
        let _ = std::fs::remove_dir(&self.path);
    }
}
