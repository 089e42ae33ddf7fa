//! The files that this process writes to.
//!
//! Two images on one file in one process would overwrite each other's metadata, whatever the locks
//! of the file are: they may be off, or its file system may have none.

use std::collections::BTreeSet;
use std::path::Path;

use super::FileIdentity;
use crate::access::Access;
use crate::error::{Error, ErrorKind, Result};
use crate::ordered_lock::{OrderedMutex, rank};

/// Devices and inodes.
static WRITTEN: OrderedMutex<{ rank::WRITTEN_FILES }, BTreeSet<(u64, u64)>> =
    OrderedMutex::new(BTreeSet::new());

/// While it exists, its file is opened for writing by nobody else in this process.
#[derive(Debug)]
pub(super) struct OnlyWriter(u64, u64);

impl OnlyWriter {
    /// `None` for a file that is only read; `Busy` if the process writes to the file already.
    pub(super) fn of(file: FileIdentity, path: &Path, access: Access) -> Result<Option<Self>> {
        if access == Access::ReadOnly {
            return Ok(None);
        }
        let FileIdentity { device, inode } = file;
        if WRITTEN.lock().insert((device, inode)) {
            return Ok(Some(Self(device, inode)));
        }
        let detail = "this process has it open for writing already, as another export perhaps, and \
                      two writers would destroy it whether there are locks or not; close it first";
        Err(Error::new(ErrorKind::Busy, "open", detail).with_path(path))
    }
}

/// Returns whether this process writes to the file.
pub(super) fn writes_to(file: FileIdentity) -> bool {
    WRITTEN.lock().contains(&(file.device, file.inode))
}

impl Drop for OnlyWriter {
    fn drop(&mut self) {
        WRITTEN.lock().remove(&(self.0, self.1));
    }
}
