//! Block devices that are overwritten. Nothing can take their place in one step as a new file does; instead they
//! say that they are incomplete until everything is on them.

use std::path::Path;
use std::sync::Arc;

use imgfmt::storage::FileStorage;
use imgfmt::{CreateOptions, Image, Locking, NewOnDevice, Unfinished};

use crate::error::CommandError;
use crate::output::{printable, warn};

/// Begins an image on a device.
///
/// # Errors
///
/// If there is no room for it or the device is in use: nothing has changed then.
pub(crate) fn begin_image(
    device: &Path,
    options: &CreateOptions,
) -> Result<NewOnDevice, CommandError> {
    let new = Image::create_on_device(device, options)?;
    warn_of_loss(device);
    new.preallocate().map_err(|error| lost(device, &error.into()))?;
    Ok(new)
}

/// Begins to overwrite a device as a raw disk; the first write changes it.
///
/// # Errors
///
/// If it is in use, by the kernel too, or cannot be read.
pub(crate) fn begin_disk(device: &Path, locking: Locking) -> Result<Arc<Unfinished>, CommandError> {
    let storage = FileStorage::open_device(device, locking)?;
    let unfinished = Unfinished::new(Arc::new(storage));
    unfinished.map(Arc::new).map_err(|error| {
        CommandError::new(format!("cannot read what is on '{}': {error}", device.display()))
    })
}

/// Says what an interruption would cost, before the first write.
pub(crate) fn warn_of_loss(device: &Path) {
    warn(&format!(
        "what is on '{}' is overwritten, and lost even if this command is interrupted",
        printable(&device.to_string_lossy())
    ));
}

/// Lets a raw disk show what was written to it, durably.
///
/// # Errors
///
/// If it cannot be flushed.
pub(crate) fn complete_disk(device: &Path, disk: &Unfinished) -> Result<(), CommandError> {
    disk.complete().map_err(|error| {
        let error = CommandError::new(format!("cannot flush '{}': {error}", device.display()));
        lost(device, &error)
    })
}

/// An error with what it leaves on a device that was to be overwritten.
pub(crate) fn lost(device: &Path, error: &CommandError) -> CommandError {
    CommandError::new(format!(
        "{error}; what was on '{}' before is lost, and the device is marked as incomplete: run the command \
         again",
        device.display()
    ))
}

/// As [`lost`], for a raw disk to which nothing may have been written yet.
pub(crate) fn lost_disk(device: &Path, disk: &Unfinished, error: &CommandError) -> CommandError {
    match disk.is_incomplete() {
        true => lost(device, error),
        false => CommandError::new(format!("{error}; '{}' is as it was before", device.display())),
    }
}
