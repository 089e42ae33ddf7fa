//! What is at a path that a command is to write to.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::error::JobError;
use crate::files::directory_of;

/// The object at a path that a command is to write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Nothing.
    Nothing,
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

/// Examines the path; links are followed.
///
/// # Errors
///
/// If it is a directory, a dangling link, or an object without contents: those are never replaced.
/// If it is a device that does not exist.
pub fn look(path: &Path) -> Result<Existing, JobError> {
    let name = path.display();
    let refuse =
        |what: &str| Err(JobError::destination(format!("cannot write to '{name}': {what}")));
    let metadata = match path.metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match path.symlink_metadata() {
                Ok(_) => refuse(
                    "it is a symbolic link to a file that does not exist; give that file's name",
                ),
                Err(_) if is_among_devices(path) => refuse(
                    "there is no such device, and a file among the devices would be kept in memory; \
                     check the name",
                ),
                Err(_) => Ok(Existing::Nothing),
            };
        }
        Err(error) => return refuse(&error.to_string()),
    };
    let kind = metadata.file_type();
    match kind {
        _ if kind.is_file() => Ok(Existing::File),
        _ if kind.is_block_device() => Ok(Existing::BlockDevice),
        _ if kind.is_dir() => refuse("it is a directory; give the name of a file in it"),
        _ if kind.is_char_device() => {
            refuse("it is a character device; give a file or a block device")
        }
        _ => refuse("it is a pipe or a socket; give a file or a block device"),
    }
}

/// Returns whether a new file would lie in the file system of the devices.
fn is_among_devices(path: &Path) -> bool {
    let devices = Path::new("/dev");
    let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
    let system = |path: &Path| path.metadata().map(|metadata| metadata.dev()).ok();
    // Others are mounted below it, for files.
    parent.is_some_and(|parent| parent.starts_with(devices) && system(&parent) == system(devices))
}

/// Returns the name that a complete file at this path has: that of the file if it is a link.
#[must_use]
pub fn final_name(path: &Path) -> Option<OsString> {
    let real = path.canonicalize();
    real.as_deref().unwrap_or(path).file_name().map(Into::into)
}

/// Returns the real name and the metadata of a file that can be replaced.
pub(super) fn replaceable(name: &Path) -> Option<(PathBuf, Metadata)> {
    // Names such as /dev/stdout stand for an open file, not for an entry of a directory.
    if ["/dev", "/proc"].iter().any(|directory| name.starts_with(directory)) {
        return None;
    }
    let metadata = name.metadata().ok()?;
    let real = name.canonicalize().ok()?;
    let found = real.symlink_metadata().ok()?;
    let is_same = (found.dev(), found.ino()) == (metadata.dev(), metadata.ino());
    let directory = directory_of(&real).metadata().ok()?;
    let is_plain = metadata.is_file() && metadata.nlink() == 1 && directory.dev() == metadata.dev();
    (is_same && is_plain).then_some((real, metadata))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_device_is_not_made_a_file_in_memory() {
        let error = look(Path::new("/dev/no-such-device-of-nbd-cli")).unwrap_err();
        assert!(error.to_string().contains("there is no such device"), "{error}");
        let elsewhere = tempfile::tempdir().unwrap();
        assert_eq!(look(&elsewhere.path().join("new")).unwrap(), Existing::Nothing);
    }
}
