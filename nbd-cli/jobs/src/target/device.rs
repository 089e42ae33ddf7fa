//! Block devices that are overwritten. Unlike a file, a device cannot be replaced in one step;
//! instead it is marked as incomplete until everything is written.

use std::path::Path;
use std::sync::Arc;

use imgfmt::storage::{Backlog, FileIdentity, FileStorage};
use imgfmt::{CacheMode, CreateOptions, Image, Locking, NewOnDevice, Unfinished};

use super::stacked::share_data;
use crate::error::{JobError, JobErrorKind};
use crate::observer::Observer;
use crate::text::printable;

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
    refuse_backing_file(device, options)?;
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

/// Refuses a device that shares data with one of the files of the source: to mark it as incomplete
/// would change what is read.
///
/// # Errors
///
/// If it does.
pub(crate) fn refuse_of_source(device: &Path, files: &[FileIdentity]) -> Result<(), JobError> {
    let shares = |own: FileIdentity| files.iter().any(|file| share_data(*file, own));
    match FileIdentity::of(device).is_some_and(shares) {
        false => Ok(()),
        true => Err(JobError::destination(format!(
            "'{}' shares its data with the source; give another destination",
            printable(&device.to_string_lossy())
        ))),
    }
}

/// Refuses a device that shares data with the backing file of the image that is to be on it.
fn refuse_backing_file(device: &Path, options: &CreateOptions) -> Result<(), JobError> {
    let Some((name, _)) = &options.backing else { return Ok(()) };
    let backing = device.parent().map_or_else(|| name.into(), |directory| directory.join(name));
    let pair = FileIdentity::of(device).zip(FileIdentity::of(&backing));
    match pair.is_some_and(|(device, backing)| share_data(device, backing)) {
        false => Ok(()),
        true => Err(JobError::destination(format!(
            "'{}' shares its data with the backing file '{}'; give another destination",
            printable(&device.to_string_lossy()),
            printable(&backing.to_string_lossy())
        ))),
    }
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
