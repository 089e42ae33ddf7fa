//! Shared parts of all ways to open a file.

use std::fs::{File, FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::FileIdentity;
use crate::error::{Error, ErrorKind, Result};

impl FileIdentity {
    /// Returns the identity of a file that is not opened; `None` if it cannot be examined. Blocks.
    pub fn of(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().map(|metadata| identity_from(&metadata))
    }
}

pub(super) fn identity_from(metadata: &Metadata) -> FileIdentity {
    let is_device = metadata.file_type().is_block_device();
    FileIdentity {
        device: if is_device { metadata.rdev() } else { metadata.dev() },
        inode: if is_device { 0 } else { metadata.ino() },
    }
}

pub(super) fn open_error(path: &Path) -> impl Fn(io::Error) -> Error {
    move |error| match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::BUSY) => {
            let detail = "the device is mounted or in use by the kernel; stop it first";
            Error::new(ErrorKind::Busy, "write to", detail).with_path(path)
        }
        _ => Error::from_io("open", error).with_path(path),
    }
}

/// Refuses everything except regular files and block devices.
pub(super) fn refuse_what_is_no_image(path: &Path, kind: FileType) -> Result<()> {
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a character device"
    };
    let detail = format!("it is {what}; give the path of an image file or of a block device");
    Err(Error::new(ErrorKind::InvalidFormat, "open", detail).with_path(path))
}

/// Clears `O_NONBLOCK`, which was needed for a safe open; some kernel interfaces would never wait
/// with it.
pub(super) fn clear_non_blocking(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags - OFlags::NONBLOCK)?)
}

/// Reads a number from the queue directory of a block device, or of the disk a partition is on.
fn queue_attribute(device: u64, name: &str) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    ["", "../"].iter().find_map(|up| {
        let path = format!("/sys/dev/block/{major}:{minor}/{up}queue/{name}");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    })
}

/// Whether a block device, given by its number, can discard.
pub(super) fn device_can_discard(device: u64) -> bool {
    queue_attribute(device, "discard_max_bytes").is_some_and(|bytes| bytes > 0)
}
