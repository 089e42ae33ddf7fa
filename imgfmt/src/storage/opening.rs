//! What all ways to open a file share.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::io::Errno;

use super::FileIdentity;
use crate::error::{Error, ErrorKind};

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
