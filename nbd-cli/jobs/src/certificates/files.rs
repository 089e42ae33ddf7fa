//! Writing the files of credentials.
//!
//! A file is written beside its final name, synced and renamed, so that a name never leads to a
//! part of a file, and an existing file stays as it is until the new one is complete.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown,
};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::credentials_error;
use crate::error::JobError;
use crate::observer::Observer;

/// Longest file that is read, in bytes. A bundle of all public authorities has about 220 KiB.
const MAX_LEN: u64 = 4 << 20;

/// The treatment of files that exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExistingCredentials {
    /// They stay, and the call fails.
    Refuse,
    /// They are replaced, when the new ones are complete.
    Replace,
}

/// Access to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Secrecy {
    /// Its owner only.
    Secret,
    /// All users may read it.
    Public,
}

impl Secrecy {
    /// The mode of a new file.
    fn mode(self) -> u32 {
        match self {
            Self::Secret => 0o600,
            Self::Public => 0o644,
        }
    }

    /// The mode of a file that replaces another one, of which a service may be the group.
    fn mode_instead_of(self, old: u32) -> u32 {
        match self {
            Self::Secret => old & 0o770,
            Self::Public => old & 0o777,
        }
    }
}

/// A file to be written.
#[derive(Debug)]
pub(super) struct CredentialsFile {
    pub(super) path: PathBuf,
    pub(super) contents: Vec<u8>,
    pub(super) secrecy: Secrecy,
}

/// A directory that no other process changes by this module until this is dropped.
#[derive(Debug)]
pub(super) struct Locked {
    directory: File,
}

/// Creates a directory that only its owner can enter, unless it exists, and locks it.
pub(super) fn create_and_lock(directory: &Path) -> Result<Locked, JobError> {
    let created = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    created.map_err(|error| failed("create the directory", directory, &error))?;
    lock(directory)
}

/// Waits for others that change a directory.
pub(super) fn lock(directory: &Path) -> Result<Locked, JobError> {
    let file = File::open(directory);
    let file = file.map_err(|error| failed("open the directory", directory, &error))?;
    match file.lock() {
        // Some network file systems have no locks; two people seldom meet there.
        Err(error) if error.kind() != io::ErrorKind::Unsupported => {
            Err(failed("lock the directory", directory, &error))
        }
        _ => Ok(Locked { directory: file }),
    }
}

/// Reads a file of at most 4 MiB; returns `None` if it does not exist.
///
/// # Errors
///
/// If it cannot be read or is longer.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, JobError> {
    let read = || {
        let mut contents = Vec::new();
        File::open(path)?.take(MAX_LEN + 1).read_to_end(&mut contents)?;
        if contents.len() as u64 > MAX_LEN {
            return Err(io::Error::other("it is too large for a file of certificates or keys"));
        }
        Ok(contents)
    };
    match read() {
        Ok(contents) => Ok(Some(contents)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path, &error)),
    }
}

/// Returns whether every user of this system can read a file.
#[must_use]
pub(super) fn readable_by_others(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.mode() & 0o004 != 0)
}

/// Writes files of a locked directory, in this order.
///
/// # Errors
///
/// If one exists and is not to be replaced, before anything is written; those of the system.
pub(super) fn write(
    lock: &Locked,
    files: &[CredentialsFile],
    existing: ExistingCredentials,
    observer: &dyn Observer,
) -> Result<(), JobError> {
    if existing == ExistingCredentials::Refuse
        && let Some(file) = files.iter().find(|file| file.path.symlink_metadata().is_ok())
    {
        return Err(exists(&file.path));
    }
    let mut complete: Vec<Complete> = Vec::with_capacity(files.len());
    for file in files {
        complete.push(Complete::write(file, observer)?);
    }
    for file in complete {
        file.publish(existing)?;
    }
    // Without this a power failure could take back what was reported.
    let _ = lock.directory.sync_all();
    Ok(())
}

fn exists(path: &Path) -> JobError {
    credentials_error(format!(
        "'{}' exists; choose another directory, or add --force to replace it",
        path.display()
    ))
}

/// A complete file under its temporary name. It is removed on drop.
struct Complete {
    temporary: Option<PathBuf>,
    name: PathBuf,
}

impl Complete {
    fn write(file: &CredentialsFile, observer: &dyn Observer) -> Result<Self, JobError> {
        // The file at the end of a link is replaced, not the link.
        let name = file.path.canonicalize().unwrap_or_else(|_| file.path.clone());
        let mut temporary = OsString::from(&name);
        temporary.push(".partial");
        let complete = Self { temporary: Some(temporary.into()), name };
        complete.fill(file, observer).map_err(|error| failed("write", &file.path, &error))?;
        Ok(complete)
    }

    fn fill(&self, file: &CredentialsFile, observer: &dyn Observer) -> io::Result<()> {
        let Some(path) = &self.temporary else { return Ok(()) };
        match fs::remove_file(path) {
            // A leftover of an interrupted command: others are locked out.
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        target.write_all(&file.contents)?;
        let mode = match self.name.symlink_metadata() {
            Ok(old) => {
                keep_owner(&target, &old, &file.path, observer);
                file.secrecy.mode_instead_of(old.mode())
            }
            Err(_) => file.secrecy.mode(),
        };
        target.set_permissions(Permissions::from_mode(mode))?;
        target.sync_all()
    }

    fn publish(mut self, existing: ExistingCredentials) -> Result<(), JobError> {
        let Some(temporary) = self.temporary.take() else { return Ok(()) };
        let renamed = match existing {
            ExistingCredentials::Replace => fs::rename(&temporary, &self.name),
            ExistingCredentials::Refuse => rename_to_unused(&temporary, &self.name),
        };
        renamed.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            match error.kind() {
                io::ErrorKind::AlreadyExists => exists(&self.name),
                _ => failed("write", &self.name, &error),
            }
        })
    }
}

impl Drop for Complete {
    fn drop(&mut self) {
        if let Some(path) = &self.temporary {
            // The keys in it were never used.
            let _ = fs::remove_file(path);
        }
    }
}

/// The service that reads a file must be able to read the new one.
fn keep_owner(target: &File, old: &Metadata, path: &Path, observer: &dyn Observer) {
    let Ok(new) = target.metadata() else { return };
    if (new.uid(), new.gid()) != (old.uid(), old.gid())
        && fchown(target, Some(old.uid()), Some(old.gid())).is_err()
    {
        observer.warning(&format!(
            "'{}' belongs to you now, and not to its earlier owner",
            path.display()
        ));
    }
}

fn rename_to_unused(temporary: &Path, name: &Path) -> io::Result<()> {
    match renameat_with(CWD, temporary, CWD, name, RenameFlags::NOREPLACE) {
        // Network file systems and FUSE: a hard link never replaces a file either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            fs::hard_link(temporary, name)?;
            fs::remove_file(temporary)
        }
        renamed => renamed.map_err(io::Error::from),
    }
}

fn failed(operation: &str, path: &Path, error: &io::Error) -> JobError {
    credentials_error(format!("cannot {operation} '{}': {error}", path.display()))
}
