//! The sidecar as a file beside the image: `IMAGE.dirty`.

mod create;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};

#[cfg(any(test, feature = "test-util"))]
pub(super) use self::create::write_all;
use super::layout::Description;
use super::location::{FoundBytes, InitialWords, SidecarLocation, SidecarStorage};
use super::lock::lock;
use super::map::WordMap;
use crate::access::Access;

const SUFFIX: &str = ".dirty";
/// A file with this suffix, or this suffix and a number, is not finished and may be removed.
const NEW_SUFFIX: &str = ".dirty.new";
/// The number of names that are tried for an unfinished file: some may be taken, for example by a
/// directory.
const NEW_NAMES: u32 = 16;

/// Clocks that differ by at most this are taken as the same clock.
const CLOCK_NANOSECONDS: u64 = 1_000_000_000;

/// Only its owner may read and write a sidecar.
const NEW_MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Why a sidecar is not trusted, as a clause.
#[derive(Debug)]
pub(super) struct Untrusted(String);

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Untrusted {}

/// The location of the sidecar of an image, even if it does not exist.
#[derive(Debug)]
pub(crate) struct SidecarPlace {
    directory: File,
    /// For messages only.
    path: PathBuf,
    name: OsString,
    new_name: OsString,
    /// The owner of the image, who may have created its sidecar, as may this user and root.
    image_owner: u32,
}

impl SidecarPlace {
    /// The place beside an image. Links to the image are resolved, so that every path to an image
    /// leads to the same sidecar.
    pub(crate) fn beside(image: &Path) -> io::Result<Self> {
        let image = std::fs::canonicalize(image)?;
        let image_owner = std::fs::metadata(&image)?.uid();
        let (Some(directory), Some(name)) = (image.parent(), image.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let with = |suffix: &str| {
            let mut whole = name.to_owned();
            whole.push(OsStr::new(suffix));
            whole
        };
        let (name, new_name) = (with(SUFFIX), with(NEW_SUFFIX));
        let path = directory.join(&name);
        Ok(Self { directory: File::open(directory)?, path, name, new_name, image_owner })
    }

    fn is_there(&self, name: &OsStr) -> bool {
        rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Refuses to continue if a file cannot replace what has the sidecar's name.
    fn refuse_what_is_in_the_way(&self) -> io::Result<()> {
        let status =
            match rustix::fs::statat(&self.directory, &*self.name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => return Ok(()),
                other => other?,
            };
        let path = self.path.display();
        if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
            let detail = format!(
                "'{path}' is a directory, and the file with the bits needs that name; \
                                  move it away"
            );
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, detail));
        }
        let (directory, user) = (self.directory.metadata()?, rustix::process::geteuid().as_raw());
        let is_sticky = directory.mode() & 0o1000 != 0;
        if is_sticky && user != 0 && ![status.st_uid, directory.uid()].contains(&user) {
            let detail = format!(
                "'{path}' belongs to user {}, and this directory lets only him replace it; have it \
                 moved away",
                status.st_uid
            );
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, detail));
        }
        Ok(())
    }

    /// As [`SidecarLocation::open`]. The file is locked while it is open.
    pub(super) fn open_file(&self, access: Access) -> io::Result<Option<FoundFile>> {
        let mode = match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        let flags = mode | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: OwnedFd =
            match rustix::fs::openat(&self.directory, &*self.name, flags, Mode::empty()) {
                Err(Errno::NOENT) => return Ok(None),
                other => other?,
            };
        let file = File::from(file);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.refuse_untrusted(&metadata)?;
        lock(&file, access)?;
        Ok(Some(FoundFile(file)))
    }

    /// Refuses a file whose bits another user may have set or cleared.
    fn refuse_untrusted(&self, metadata: &Metadata) -> io::Result<()> {
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        let user = rustix::process::geteuid().as_raw();
        let path = self.path.display();
        let detail = if ![user, 0, self.image_owner].contains(&owner) {
            format!(
                "the file with the bits, '{path}', belongs to user {owner}, neither the \
                 image's owner nor the user who opens it, so it is not trusted; if it is genuine, \
                 give it to the image's owner with 'chown {}' before the image is opened for writing",
                self.image_owner
            )
        } else if mode & 0o022 != 0 {
            format!(
                "others may write the file with the bits, '{path}' (mode {mode:o}), so it is not \
                 trusted; if they have not, use 'chmod 600' before the image is opened for writing"
            )
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::PermissionDenied, Untrusted(detail)))
    }

    fn unlink(&self, name: &OsStr) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            other => other.map_err(io::Error::from),
        }
    }
}

impl SidecarLocation for SidecarPlace {
    fn create(
        &self,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<Box<dyn SidecarStorage>> {
        Ok(Box::new(self.create_file(description, words)?))
    }

    fn open(&self, access: Access) -> io::Result<Option<Box<dyn FoundBytes>>> {
        let found = self.open_file(access)?;
        Ok(found.map(|file| Box::new(file) as Box<dyn FoundBytes>))
    }

    fn remove(&self) -> io::Result<()> {
        self.unlink(&self.name)?;
        self.directory.sync_all()
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn probe(&self, description: &Description) -> io::Result<()> {
        self.create_and_remove(description)
    }

    fn boot_id(&self) -> String {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        id.map(|id| id.trim_end().to_owned()).unwrap_or_default()
    }
}

/// A sidecar's file that was found. It is locked.
#[derive(Debug)]
pub(super) struct FoundFile(pub(super) File);

impl FoundBytes for FoundFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_bytes(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
}

impl Drop for FoundFile {
    fn drop(&mut self) {
        // Closing is not enough: a process that another thread has just forked keeps the
        // descriptor, and with it the lock, until it executes its program.
        let _ = self.0.unlock();
    }
}

impl Drop for SidecarFile {
    fn drop(&mut self) {
        // As above.
        let _ = self.file.unlock();
    }
}

/// A sidecar's file that is mapped.
#[derive(Debug)]
pub(crate) struct SidecarFile {
    place: SidecarPlace,
    file: File,
    inode: u64,
    map: WordMap,
}

impl SidecarStorage for SidecarFile {
    fn words(&self) -> &[AtomicU64] {
        self.map.words()
    }

    fn write_durable(&self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let slices = [io::IoSlice::new(bytes)];
            match rustix::io::pwritev2(&self.file, &slices, offset, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    bytes = bytes.get(written..).unwrap_or_default();
                    offset += written as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    self.file.write_all_at(bytes, offset)?;
                    return self.file.sync_data();
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.map.sync()
    }

    fn remove(&self) -> io::Result<()> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        match rustix::fs::statat(&self.place.directory, &*self.place.name, flags) {
            // A newer epoch or another file has replaced it.
            Ok(found) if found.st_ino != self.inode => Ok(()),
            Ok(_) => self.place.remove(),
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests;
