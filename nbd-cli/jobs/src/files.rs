//! Opening local files.

use std::path::Path;

use imgfmt::storage::FileStorage;
use imgfmt::{Access, Locking};

use crate::observer::Observer;

/// Opens a file, and informs the observer if its file system has no locks.
pub(crate) fn open_file(
    path: &Path,
    access: Access,
    locking: Locking,
    observer: &dyn Observer,
) -> imgfmt::Result<FileStorage> {
    let storage = FileStorage::open(path, access, locking)?;
    if storage.lacks_locks() {
        observer.unlocked(path);
    }
    Ok(storage)
}
