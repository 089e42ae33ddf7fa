//! A private directory for sockets and files.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use crate::error::CommandError;

/// A directory that only this user can enter, with a socket in it; removed on drop.
#[derive(Debug)]
pub(crate) struct PrivateDirectory {
    path: PathBuf,
}

impl PrivateDirectory {
    pub(crate) fn new() -> Result<Self, CommandError> {
        Self::inside(&std::env::temp_dir())
    }

    /// Creates a directory in `parent`.
    pub(crate) fn inside(parent: &Path) -> Result<Self, CommandError> {
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
        Err(CommandError::new(format!(
            "cannot create a private directory in '{}': {why}; set TMPDIR to a directory you may write to",
            parent.display()
        )))
    }

    /// Returns a directory for the file of --temporary, which does not stay there.
    pub(crate) fn overlay(&self) -> PathBuf {
        self.path.join("overlay.qcow2")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join("socket")
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        // The server has removed its socket before; there are no other files.
        let _ = std::fs::remove_dir(&self.path);
    }
}
