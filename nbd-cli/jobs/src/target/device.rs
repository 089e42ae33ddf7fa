//! Block devices that are overwritten. Nothing can take their place in one step as a new file does; instead they
//! say that they are incomplete until everything is on them.

use std::path::Path;
use std::sync::Arc;

use imgfmt::storage::FileStorage;
use imgfmt::{CreateOptions, Image, Locking, NewOnDevice, Unfinished};

use crate::text::printable;
use crate::{JobError, JobErrorKind, Observer};

/// Begins an image on a device.
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

/// Lets an image that was made on a device be valid, durably.
///
/// # Errors
///
/// If it cannot be written.
pub fn complete_image(device: &Path, new: NewOnDevice) -> Result<(), JobError> {
    new.complete().map_err(|error| lost(device, &image_error(error)))
}

/// Begins to overwrite a device as a raw disk; the first write changes it.
///
/// # Errors
///
/// If it is in use, by the kernel too, or cannot be read.
pub fn begin_disk(device: &Path, locking: Locking) -> Result<Arc<Unfinished>, JobError> {
    let storage = FileStorage::open_device(device, locking).map_err(image_error)?;
    let unfinished = Unfinished::new(Arc::new(storage));
    unfinished.map(Arc::new).map_err(|error| {
        JobError::destination(format!("cannot read what is on '{}': {error}", device.display()))
    })
}

/// Says what an interruption would cost, before the first write.
pub fn warn_of_loss(device: &Path, observer: &dyn Observer) {
    observer.warning(&format!(
        "what is on '{}' is overwritten, and lost even if this command is interrupted",
        printable(&device.to_string_lossy())
    ));
}

/// Lets a raw disk show what was written to it, durably.
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

fn image_error(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Destination, error)
}

/// What there is when the command fails on a device that was to be overwritten, in words that follow a
/// semicolon.
pub fn left_behind(device: &Path) -> String {
    format!(
        "what was on '{}' before is lost, and the device is marked as incomplete: run the command again",
        device.display()
    )
}

/// As [`left_behind`], for a raw disk to which nothing may have been written yet.
pub fn left_behind_on(device: &Path, disk: &Unfinished) -> String {
    match disk.is_incomplete() {
        true => left_behind(device),
        false => format!("'{}' is as it was before", device.display()),
    }
}

/// The error with what it leaves.
fn lost(device: &Path, error: &JobError) -> JobError {
    error.in_words(format!("{error}; {}", left_behind(device)))
}
