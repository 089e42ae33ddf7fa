//! Files that are renamed when they are complete.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgfmt::storage::{FileIdentity, FileStorage};
use imgfmt::{Access, BackingFile, ErrorKind, Image, Locking, OpenOptions};

use super::companions::{Companion, SUFFIX, name_all};
use super::existing::{Existing, look, replaceable};
use super::{attributes, publish};
use crate::error::{JobError, JobErrorKind};
use crate::files::directory_of;
use crate::observer::{Observer, TemporaryFile};

/// Longest file name in bytes, on every relevant file system of Linux.
const NAME_MAX: usize = 255;

/// The durability of a complete file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// The system writes it at some time.
    Later,
    /// It is on stable storage, name included.
    Now,
}

/// A growing file; removed if it is dropped before it is complete.
pub struct NewFile {
    name: PathBuf,
    partial: PathBuf,
    replaces: Option<Box<Replaced>>,
    /// Whether the given name is a link to a file in another directory.
    is_elsewhere: bool,
    /// Files that are useless without it.
    companions: Vec<Companion>,
    is_kept: bool,
    observer: Arc<dyn Observer>,
}

/// The file that has the final name until then.
#[derive(Debug)]
struct Replaced {
    metadata: Metadata,
    /// Held for its lock: a write by another program in the meantime would be lost.
    _lock: FileStorage,
}

impl NewFile {
    /// Creates a file of that name, which must not exist. `make` creates it under its temporary
    /// name, and fails if that exists; its result is returned with the file.
    ///
    /// # Errors
    ///
    /// If it exists, if another command is creating it, and those of `make`.
    pub fn begin<T, E: From<JobError>>(
        name: &Path,
        observer: &Arc<dyn Observer>,
        make: impl FnOnce(&Path) -> Result<T, E>,
    ) -> Result<(Self, T), E> {
        match look(name)? {
            Existing::Nothing => Self::make(name.to_owned(), observer, make),
            Existing::File => Err(E::from(JobError::destination(format!(
                "cannot create '{}': there is a file of that name; remove it first or choose another \
                 name",
                name.display()
            )))),
            Existing::BlockDevice => Err(E::from(JobError::destination(format!(
                "cannot create '{}': it is a block device",
                name.display()
            )))),
        }
    }

    /// As [`begin`](Self::begin), but a file of that name may exist: it stays as it is until the
    /// new one is complete, which then takes its name, its owner and its permissions. It is locked
    /// until then.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin); if the existing file is in use, or can only be changed in place.
    pub fn begin_or_replace<T, E: From<JobError>>(
        name: &Path,
        locking: Locking,
        observer: &Arc<dyn Observer>,
        make: impl FnOnce(&Path) -> Result<T, E>,
    ) -> Result<(Self, T), E> {
        if look(name)? != Existing::File {
            return Self::begin(name, observer, make);
        }
        let refused = |why: &str| {
            let name = name.display();
            E::from(JobError::destination(format!("cannot replace '{name}': {why}")))
        };
        let Some((real, metadata)) = replaceable(name) else {
            return Err(refused(
                "it has several names or is a mount point, and a new file could not take its place; \
                 remove it first or choose another name",
            ));
        };
        let lock = FileStorage::open(name, Access::ReadWrite, locking)
            .map_err(|error| E::from(JobError::image(JobErrorKind::Destination, error)))?;
        let here = directory_of(name).canonicalize().ok();
        let is_elsewhere = here.as_deref() != Some(directory_of(&real));
        let (mut new, made) = Self::make(real, observer, make)?;
        new.is_elsewhere = is_elsewhere;
        File::options()
            .write(true)
            .open(&new.partial)
            .and_then(|file| attributes::copy(&new.name, &metadata, &file))
            .map_err(|error| {
                refused(&format!("a new file cannot have its owner and permissions: {error}"))
            })?;
        new.replaces = Some(Box::new(Replaced { metadata, _lock: lock }));
        Ok((new, made))
    }

    /// Creates an empty file to replace one that exists and is open in `storage`, with the same
    /// owner and permissions. Returns the existing file if it can only be changed in place: it has
    /// other names, its directory is not writable, it is a mount point, or the new file could not
    /// be given all of its attributes.
    ///
    /// # Errors
    ///
    /// If another command is replacing it.
    pub fn instead_of(
        name: &Path,
        storage: FileStorage,
        observer: &Arc<dyn Observer>,
    ) -> Result<Result<Self, FileStorage>, JobError> {
        let Some((real, metadata)) = replaceable(name) else { return Ok(Err(storage)) };
        let partial = partial_name(&real);
        let made = Self::make(real, observer, |partial| {
            let file = File::options().write(true).create_new(true).open(partial);
            file.map(drop).map_err(|error| JobError::destination(error.to_string()))
        });
        let mut new = match made {
            Ok((new, ())) => new,
            Err(error) if partial.is_some_and(|partial| partial.symlink_metadata().is_ok()) => {
                return Err(error);
            }
            Err(_) => return Ok(Err(storage)),
        };
        let file = File::options().write(true).open(&new.partial);
        let is_alike = file.is_ok_and(|file| attributes::copy(&new.name, &metadata, &file).is_ok());
        if !is_alike {
            return Ok(Err(storage));
        }
        new.replaces = Some(Box::new(Replaced { metadata, _lock: storage }));
        Ok(Ok(new))
    }

    fn make<T, E: From<JobError>>(
        name: PathBuf,
        observer: &Arc<dyn Observer>,
        make: impl FnOnce(&Path) -> Result<T, E>,
    ) -> Result<(Self, T), E> {
        let partial = partial_name(&name).ok_or_else(|| {
            JobError::destination(format!("'{}' is not the name of a file", name.display()))
        })?;
        if partial.symlink_metadata().is_ok() {
            return Err(in_the_way(&name, &partial).into());
        }
        let made = make(&partial)?;
        observer.temporary_file(&partial, TemporaryFile::Made);
        let observer = observer.clone();
        let companions = Vec::new();
        let (replaces, is_elsewhere, is_kept) = (None, false, false);
        let new = Self { name, partial, replaces, is_elsewhere, companions, is_kept, observer };
        Ok((new, made))
    }

    /// Returns the temporary name.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Adds a file that was created with this one, such as its data file: it is removed with it.
    pub fn add_companion(&mut self, path: PathBuf) {
        self.add(Companion::named(path));
    }

    /// Adds the files with the data of a new image that has just been created in this one, if they
    /// are files of their own: they are named, or removed, with it.
    ///
    /// # Errors
    ///
    /// If there are files of their names, unless this one replaces an image of which they are
    /// parts: then, if they are in use or cannot be replaced.
    pub fn add_extents(&mut self, image: &Image, locking: Locking) -> Result<(), JobError> {
        // Whatever happens, they do not stay.
        image.own_files().into_iter().skip(1).for_each(|made| self.add(Companion::part(made)));
        if self.is_elsewhere && !self.companions.is_empty() {
            return Err(JobError::destination(format!(
                "the given name is a symbolic link to '{}', and programs look for the other files of the \
                 disk beside the link: give that name",
                self.name.display()
            )));
        }
        let old_parts = self.old_parts();
        for companion in &mut self.companions {
            let (made, name) = (&companion.made, &companion.name);
            if made == name || name.symlink_metadata().is_err() {
                continue;
            }
            let refused = |why: &str| {
                let name = name.display();
                JobError::destination(format!("cannot put a part of the disk into '{name}': {why}"))
            };
            let is_old = FileIdentity::of(name).is_some_and(|file| old_parts.contains(&file));
            let Some((_, metadata)) = replaceable(name).filter(|_| is_old) else {
                let why = "there is a file of that name; remove it first or choose another name";
                return Err(refused(why));
            };
            let lock = FileStorage::open(name, Access::ReadWrite, locking)
                .map_err(|error| JobError::image(JobErrorKind::Destination, error))?;
            File::options()
                .write(true)
                .open(made)
                .and_then(|file| attributes::copy(name, &metadata, &file))
                .map_err(|error| refused(&error.to_string()))?;
            companion.old = Some(lock);
        }
        Ok(())
    }

    /// The files of the image that this one replaces, as far as it can be opened.
    fn old_parts(&self) -> Vec<FileIdentity> {
        let options = OpenOptions::new().locking(Locking::Off).backing(BackingFile::Ignored);
        let old = self.replaces.as_ref().and_then(|_| Image::open(&self.name, &options).ok());
        old.map_or_else(Vec::new, |old| old.files().into_iter().map(|(_, file)| file).collect())
    }

    fn add(&mut self, companion: Companion) {
        self.observer.temporary_file(&companion.made, TemporaryFile::Made);
        self.companions.push(companion);
    }

    /// Describes the state after a failed command, in words that follow a semicolon.
    pub fn left_behind(&self) -> String {
        let name = self.name.display();
        match &self.replaces {
            Some(_) => format!("'{name}' is as it was before"),
            None => format!("'{name}' is incomplete and was removed: run the command again"),
        }
    }

    /// Renames the complete file to its final name.
    ///
    /// # Errors
    ///
    /// If it cannot be made durable or renamed, or if another file has taken the name in the
    /// meantime: the complete file then keeps its temporary name, which the error contains.
    pub fn complete(mut self, durable: Durable) -> Result<(), JobError> {
        let now = durable == Durable::Now || self.replaces.is_some();
        let result = self.publish(now);
        // A complete file is not discarded, whatever its name.
        self.is_kept = true;
        result.map_err(|error| {
            let why = match error.kind() {
                io::ErrorKind::AlreadyExists => "another file took that name in the meantime".to_owned(),
                _ => error.to_string(),
            };
            JobError::destination(format!(
                "the new file is complete, but it cannot be named '{}': {why}; it is '{}', rename it",
                self.name.display(),
                self.partial.display()
            ))
        })
    }

    fn publish(&self, now: bool) -> io::Result<()> {
        if now {
            let made = self.companions.iter().map(|companion| &companion.made);
            made.chain([&self.partial]).try_for_each(|path| File::open(path)?.sync_all())?;
        }
        let old = self.replaces.as_ref().map(|old| &old.metadata);
        name_all(&self.companions, &self.name, old)?;
        match &self.replaces {
            None => publish::as_new(&self.partial, &self.name)?,
            Some(old) => publish::instead_of(&self.partial, &self.name, &old.metadata)?,
        }
        if now { File::open(directory_of(&self.name))?.sync_all() } else { Ok(()) }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let companions = self.companions.iter().map(|companion| &companion.made);
        for path in std::iter::once(&self.partial).chain(companions) {
            if !self.is_kept {
                // A part of a disk is useless; the error that led here is reported.
                let _ = fs::remove_file(path);
            }
            self.observer.temporary_file(path, TemporaryFile::Gone);
        }
    }
}

/// Returns the temporary name, truncated if it would be too long.
pub(crate) fn partial_name(name: &Path) -> Option<PathBuf> {
    let file = name.file_name()?.as_bytes();
    let kept = file.get(..NAME_MAX - SUFFIX.len()).unwrap_or(file);
    let mut partial = kept.to_vec();
    partial.extend_from_slice(SUFFIX.as_bytes());
    Some(name.with_file_name(OsStr::from_bytes(&partial)))
}

fn in_the_way(name: &Path, partial: &Path) -> JobError {
    let is_busy = FileStorage::open(partial, Access::ReadWrite, Locking::On)
        .is_err_and(|error| error.kind() == ErrorKind::Busy);
    let (name, partial) = (name.display(), partial.display());
    JobError::destination(match is_busy {
        true => format!("another command is making '{name}' at this moment, in '{partial}'"),
        false => format!(
            "cannot make '{name}': '{partial}' is left over from a command that was killed, or from a backup; \
             remove it if it is not needed, and run the command again"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observer::JobContext;

    #[test]
    fn a_file_is_replaced_when_the_new_one_is_complete_and_not_before() {
        let directory = tempfile::tempdir().unwrap();
        let name = directory.path().join("disk");
        let observer = JobContext::default().observer;
        let make = |path: &Path| {
            fs::write(path, "new").map_err(|error| JobError::destination(error.to_string()))
        };
        let begin = || NewFile::begin_or_replace(&name, Locking::On, &observer, make);
        for existing in [None, Some("old")] {
            if let Some(old) = existing {
                fs::write(&name, old).unwrap();
            }
            drop(begin().unwrap());
            assert_eq!(fs::read_to_string(&name).ok().as_deref(), existing);
            let (new, ()) = begin().unwrap();
            assert_eq!(fs::read_to_string(&name).ok().as_deref(), existing);
            new.complete(Durable::Later).unwrap();
            assert_eq!(fs::read(&name).unwrap(), b"new");
        }
        let user = FileStorage::open(&name, Access::ReadWrite, Locking::On).unwrap();
        assert!(begin().is_err(), "it is in use");
        drop(user);
        fs::hard_link(&name, directory.path().join("other name")).unwrap();
        assert!(begin().is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "nothing is left behind");
    }

    #[test]
    fn a_companion_is_removed_with_its_file_and_kept_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let [name, data] = ["disk", "disk.data"].map(|name| directory.path().join(name));
        let observer = JobContext::default().observer;
        let begin = || {
            let make = |path: &Path| {
                let made = fs::write(path, "image").and_then(|()| fs::write(&data, "data"));
                made.map_err(|error| JobError::destination(error.to_string()))
            };
            let (mut new, ()) = NewFile::begin(&name, &observer, make).unwrap();
            new.add_companion(data.clone());
            new
        };
        drop(begin());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        begin().complete(Durable::Later).unwrap();
        assert!(name.exists() && data.exists());
    }

    #[test]
    fn a_long_name_is_cut_for_the_temporary_one() {
        let name = |length: usize| Path::new("/directory").join("x".repeat(length));
        let partial = partial_name(&name(20)).unwrap();
        assert!(partial.to_str().unwrap().ends_with("xxxx.partial"));
        let partial = partial_name(&name(255)).unwrap();
        assert_eq!(partial.file_name().unwrap().len(), 255);
        assert_eq!(partial_name(Path::new("/")), None);
    }
}
