//! Local files that a copy overwrites.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use imgfmt::storage::FileStorage;
use imgfmt::{Access, ErrorKind, Locking, Storage as _};

use super::source::Source;
use crate::error::{JobError, JobErrorKind};
use crate::files::open_file;
use crate::observer::JobContext;
use crate::target::{self, Existing, NewFile};

/// A file that is going to be overwritten.
pub(super) enum LocalFile {
    /// Truncated or new; `NewFile` if it does not have its final name yet.
    Regular(FileStorage, Option<NewFile>),
    /// A block device, which is not open yet.
    BlockDevice,
}

/// Opens a file for overwriting, or creates it.
///
/// # Errors
///
/// If the file cannot be opened or created, or is the source.
pub(super) fn open_for_overwriting(
    path: &Path,
    locking: Locking,
    source: &Source,
    context: &JobContext,
) -> Result<LocalFile, JobError> {
    let observer = &context.observer;
    let storage = match open_file(path, Access::ReadWrite, locking, &**observer) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let (new, ()) = NewFile::begin(path, observer, create_empty)?;
            let storage =
                FileStorage::open(new.path(), Access::ReadWrite, locking).map_err(image_error)?;
            return Ok(LocalFile::Regular(storage, Some(new)));
        }
        Err(error) if error.kind() == ErrorKind::Busy && is_same_file(path, source) => {
            return Err(same_file(path));
        }
        opened => opened.map_err(image_error)?,
    };
    if storage.identity().is_some_and(|own| source.is_on(own)) {
        return Err(same_file(path));
    }
    if target::look(path)? == Existing::BlockDevice {
        drop(storage);
        return Ok(LocalFile::BlockDevice);
    }
    let storage = match NewFile::instead_of(path, storage, observer)? {
        Ok(new) => {
            let storage =
                FileStorage::open(new.path(), Access::ReadWrite, locking).map_err(image_error)?;
            return Ok(LocalFile::Regular(storage, Some(new)));
        }
        Err(storage) => storage,
    };
    storage.set_len(0).map_err(|error| file_error("empty", path, None, &error))?;
    Ok(LocalFile::Regular(storage, None))
}

/// Creates an empty file.
pub(crate) fn create_empty(path: &Path) -> Result<(), JobError> {
    let made = OpenOptions::new().write(true).create_new(true).open(path);
    made.map(drop).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "; does its directory exist?",
            _ => "",
        };
        JobError::destination(format!("cannot create '{}': {error}{advice}", path.display()))
    })
}

/// Our own lock on the source prevents opening it again for writing.
fn is_same_file(path: &Path, source: &Source) -> bool {
    FileStorage::open(path, Access::ReadOnly, Locking::Off)
        .is_ok_and(|file| file.identity().is_some_and(|own| source.is_on(own)))
}

fn same_file(path: &Path) -> JobError {
    JobError::destination(format!(
        "'{}' is the source and the destination; give another destination",
        path.display()
    ))
}

pub(super) fn image_error(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Destination, error)
}

pub(super) fn file_error(
    operation: &str,
    path: &Path,
    offset: Option<u64>,
    error: &io::Error,
) -> JobError {
    let is_elsewhere = error.get_ref().is_some_and(|inner| inner.is::<imgfmt::LostWriteback>());
    let offset = offset.filter(|_| !is_elsewhere);
    let position = offset.map(|offset| format!(" at offset {offset}")).unwrap_or_default();
    let advice = match error.kind() {
        io::ErrorKind::StorageFull => "; free some space or choose another destination",
        io::ErrorKind::FileTooLarge => {
            return JobError::destination(format!(
                "cannot {operation} '{}'{position}: the file would become larger than the limit of this \
                 process (ulimit -f) or of the file system allows",
                path.display()
            ));
        }
        _ => "",
    };
    JobError::destination(format!(
        "cannot {operation} '{}'{position}: {error}{advice}",
        path.display()
    ))
}
