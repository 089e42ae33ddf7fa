//! Block devices that are overwritten. Unlike a file, a device cannot be replaced in one step;
//! instead it is marked as incomplete until everything is written.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use imgfmt::storage::{Backlog, FileIdentity, FileStorage};
use imgfmt::{CacheMode, CreateOptions, Image, Locking, NewOnDevice, Unfinished};

use crate::text::printable;
use crate::{JobError, JobErrorKind, Observer};

/// Starts an image on a device.
///
/// # Errors
///
/// If there is no room for it or the device is in use: nothing has changed then.
pub fn begin_image(
    device: &Path,
    options: &CreateOptions,
    observer: &dyn Observer,
) -> Result<NewOnDevice, JobError> {
    let new = Image::create_on_device(device, options).map_err(image_error)?;
    warn_of_loss(device, observer);
    new.preallocate().map_err(|error| lost(device, &image_error(error)))?;
    Ok(new)
}

/// Makes an image that was created on a device valid, durably.
///
/// # Errors
///
/// If it cannot be written.
pub fn complete_image(device: &Path, new: NewOnDevice) -> Result<(), JobError> {
    new.complete().map_err(|error| lost(device, &image_error(error)))
}

/// Starts to overwrite a device as a raw disk, which uses the page cache as `cache` says; the first
/// write changes it.
///
/// # Errors
///
/// If it is in use, also by the kernel, or cannot be read.
pub fn begin_disk(
    device: &Path,
    locking: Locking,
    cache: CacheMode,
) -> Result<Arc<Unfinished>, JobError> {
    let storage = FileStorage::open_device_cached(device, locking, cache).map_err(image_error)?;
    let unfinished = Unfinished::new(Arc::new(storage.written_once(Backlog::Limited)));
    unfinished.map(Arc::new).map_err(|error| {
        JobError::destination(format!("cannot read what is on '{}': {error}", device.display()))
    })
}

/// Warns of the cost of an interruption, before the first write.
pub fn warn_of_loss(device: &Path, observer: &dyn Observer) {
    observer.warning(&format!(
        "the data on '{}' is overwritten, and lost even if this command is interrupted",
        printable(&device.to_string_lossy())
    ));
}

/// Makes a raw disk expose its contents, durably.
///
/// # Errors
///
/// If it cannot be flushed.
pub fn complete_disk(device: &Path, disk: &Unfinished) -> Result<(), JobError> {
    disk.complete().map_err(|error| {
        let error = JobError::destination(format!("cannot flush '{}': {error}", device.display()));
        lost(device, &error)
    })
}

/// Refuses a device that is, or has its data in, one of the files of the source: to mark it as
/// incomplete would change what is read.
///
/// # Errors
///
/// If it is so.
pub(crate) fn refuse_of_source(device: &Path, files: &[FileIdentity]) -> Result<(), JobError> {
    let of_source = |file: FileIdentity| files.contains(&file);
    if !FileIdentity::of(device).is_some_and(of_source) && !behind(device).is_some_and(of_source) {
        return Ok(());
    }
    Err(JobError::destination(format!(
        "the source is on '{}', which is the destination; give another destination",
        printable(&device.to_string_lossy())
    )))
}

/// Returns the file in which a loop device, or a partition of one, has its data.
pub(crate) fn behind(device: &Path) -> Option<FileIdentity> {
    let metadata = device.metadata().ok().filter(|it| it.file_type().is_block_device())?;
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    let place = format!("/sys/dev/block/{major}:{minor}");
    let read = |loops: &str| std::fs::read(format!("{place}/{loops}/backing_file")).ok();
    // A partition is below its disk.
    let name = read("loop").or_else(|| read("../loop"))?;
    FileIdentity::of(Path::new(OsStr::from_bytes(name.strip_suffix(b"\n")?)))
}

fn image_error(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Destination, error)
}

/// Describes the state of a device after a failed command, in words that follow a semicolon.
pub fn left_behind(device: &Path) -> String {
    format!(
        "the previous data on '{}' is lost, and the device is marked as incomplete: run the command again",
        device.display()
    )
}

/// Like [`left_behind`], for a raw disk to which nothing may have been written yet.
pub fn left_behind_on(device: &Path, disk: &Unfinished) -> String {
    match disk.is_incomplete() {
        true => left_behind(device),
        false => format!("'{}' is as it was before", device.display()),
    }
}

/// Returns the error with the state it leaves.
fn lost(device: &Path, error: &JobError) -> JobError {
    error.in_words(format!("{error}; {}", left_behind(device)))
}
