//! Local files: opening them, and the directories they are in.

use std::path::Path;

use imgfmt::storage::FileStorage;
use imgfmt::{Access, CacheMode, Locking};

use crate::observer::Observer;

/// Opens a file, and informs the observer if its file system has no locks.
pub(crate) fn open_file(
    path: &Path,
    access: Access,
    locking: Locking,
    observer: &dyn Observer,
) -> imgfmt::Result<FileStorage> {
    open_cached(path, access, locking, CacheMode::default(), observer)
}

/// Like [`open_file`], with a use of the page cache.
pub(crate) fn open_cached(
    path: &Path,
    access: Access,
    locking: Locking,
    cache: CacheMode,
    observer: &dyn Observer,
) -> imgfmt::Result<FileStorage> {
    let storage = FileStorage::open_cached(path, access, locking, cache)?;
    if storage.lacks_locks() {
        observer.unlocked(path);
    }
    Ok(storage)
}

/// Returns the directory of a file.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}
