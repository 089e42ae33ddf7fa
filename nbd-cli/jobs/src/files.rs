//! Local files: opening them, and the directories they are in.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
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

/// Returns whether an open file still has its name: another process may have removed it.
pub fn is_still(path: &Path, file: &File) -> bool {
    match (std::fs::metadata(path), file.metadata()) {
        (Ok(named), Ok(open)) => (named.dev(), named.ino()) == (open.dev(), open.ino()),
        _ => false,
    }
}

/// Returns the directory of a file.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_removed_or_replaced_has_lost_its_name() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("lock");
        let file = File::create(&path).expect("room");
        assert!(is_still(&path, &file));
        std::fs::remove_file(&path).expect("it is there");
        assert!(!is_still(&path, &file));
        let other = File::create(&path).expect("room");
        assert!(!is_still(&path, &file) && is_still(&path, &other));
    }
}
