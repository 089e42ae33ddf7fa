//! Renames a file in one step.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

/// Renames a file to an unused name.
///
/// # Errors
///
/// `AlreadyExists` if the name is used, and those of the system.
pub(super) fn as_new(partial: &Path, name: &Path) -> io::Result<()> {
    match renameat_with(CWD, partial, CWD, name, RenameFlags::NOREPLACE) {
        // Network file systems and FUSE: a hard link, which never replaces a file either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => by_link(partial, name),
        renamed => renamed.map_err(io::Error::from),
    }
}

fn by_link(partial: &Path, name: &Path) -> io::Result<()> {
    match fs::hard_link(partial, name) {
        Ok(()) => {
            // It has both names: the temporary one may stay.
            let _ = fs::remove_file(partial);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error),
        // There are no hard links either.
        Err(_) if name.symlink_metadata().is_ok() => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_) => fs::rename(partial, name),
    }
}

/// Renames a file to the name of another one, if that is still the file to be replaced.
///
/// # Errors
///
/// `AlreadyExists` if it is another one, and those of the system.
pub(super) fn instead_of(partial: &Path, name: &Path, old: &Metadata) -> io::Result<()> {
    match name.symlink_metadata() {
        Ok(now) if (now.dev(), now.ino()) == (old.dev(), old.ino()) => fs::rename(partial, name),
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => as_new(partial, name),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_taken_is_left_alone_in_every_way() {
        let directory = tempfile::tempdir().unwrap();
        let (partial, name) = (directory.path().join("partial"), directory.path().join("name"));
        for publish in [as_new, by_link] {
            fs::write(&partial, "new").unwrap();
            fs::write(&name, "old").unwrap();
            assert_eq!(publish(&partial, &name).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read(&name).unwrap(), b"old");
            fs::remove_file(&name).unwrap();
            publish(&partial, &name).unwrap();
            assert_eq!(fs::read(&name).unwrap(), b"new");
            assert!(!partial.exists());
            fs::remove_file(&name).unwrap();
        }
    }

    #[test]
    fn only_the_file_that_was_meant_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (partial, name) = (directory.path().join("partial"), directory.path().join("name"));
        fs::write(&partial, "new").unwrap();
        fs::write(&name, "old").unwrap();
        let old = name.metadata().unwrap();
        // Another file takes its name; the old one stays alive, or its inode number could be
        // reused.
        fs::rename(&name, directory.path().join("moved")).unwrap();
        fs::write(&name, "other").unwrap();
        assert!(instead_of(&partial, &name, &old).is_err());
        assert_eq!(fs::read(&name).unwrap(), b"other");
        fs::rename(directory.path().join("moved"), &name).unwrap();
        instead_of(&partial, &name, &old).unwrap();
        assert_eq!(fs::read(&name).unwrap(), b"new");
    }
}
