//! The file with the id of the serving process.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nbd_jobs::files::is_still;
use rustix::fs::FlockOperation;

use crate::error::CommandError;

/// Attempts to lock a file that other processes keep replacing.
const MAX_ATTEMPTS: usize = 100;

/// More bytes than such a file has.
const TOO_LONG: u64 = 64;

/// A written file, locked until this is dropped. The file remains, as in qemu-nbd: a file without a
/// lock is stale.
#[derive(Debug)]
pub(crate) struct PidFile {
    _locked: File,
}

impl PidFile {
    /// Writes the id of this process.
    ///
    /// # Errors
    ///
    /// If the file cannot be written, or another process holds its lock.
    pub(crate) fn write(path: &Path) -> Result<Self, CommandError> {
        let failed = |what: &str, error: &io::Error| {
            CommandError::new(format!("Cannot {what} pid file '{}': {error}", path.display()))
        };
        for _ in 0..MAX_ATTEMPTS {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let mut file = options.open(path).map_err(|error| failed("open", &error))?;
            rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
                .map_err(|error| failed("lock", &error.into()))?;
            if !is_still(path, &file) {
                continue;
            }
            if is_of_other_use(&file).map_err(|error| failed("read", &error))? {
                return Err(CommandError::new(format!(
                    "Cannot write pid file '{}': there is something else in it than the id of a \
                     process; give another name, or remove it first",
                    path.display()
                )));
            }
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| writeln!(file, "{}", std::process::id()))
                .map_err(|error| failed("write", &error))?;
            return Ok(Self { _locked: file });
        }
        Err(CommandError::new(format!(
            "Cannot lock pid file '{}': it keeps changing",
            path.display()
        )))
    }

    /// Writes it to where the user wants one, if so, and keeps it.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub(crate) fn write_and_keep(path: Option<&Path>) -> Result<(), CommandError> {
        path.map(Self::write).transpose()?.into_iter().for_each(Self::keep);
        Ok(())
    }

    /// Keeps the file locked until the process ends: until then, a thread may carry out the request
    /// of a client that was cut off, and no other process must use the disk.
    pub(crate) fn keep(self) {
        Box::leak(Box::new(self));
    }
}

/// Returns whether a file has contents that would be lost, such as a disk that was named by
/// mistake.
fn is_of_other_use(file: &File) -> io::Result<bool> {
    // Others, such as /dev/null, have none.
    if !file.metadata()?.is_file() {
        return Ok(false);
    }
    let mut content = Vec::new();
    file.take(TOO_LONG).read_to_end(&mut content)?;
    let is_id = content.iter().all(|byte| byte.is_ascii_digit() || byte.is_ascii_whitespace());
    Ok(!is_id || content.len() as u64 == TOO_LONG)
}
