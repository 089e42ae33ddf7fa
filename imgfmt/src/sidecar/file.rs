//! The sidecar as a file beside the image: `IMAGE.dirty`.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};

use super::layout::{self, DESCRIPTORS_OFFSET, Description, LOG_OFFSET, Layout, SLOT_BYTES};
use super::lock::lock;
use super::map::WordMap;
use super::{FoundBytes, Home, Store, nanoseconds, now_nanoseconds};
use crate::error::is_not_supported;
use crate::options::{Access, Survives};

const SUFFIX: &str = ".dirty";
/// A file under this name is not finished and may be taken away.
const NEW_SUFFIX: &str = ".dirty.new";

/// Clocks that differ by no more count as one.
const CLOCK_NANOSECONDS: u64 = 1_000_000_000;

/// Gives word `n` of the bits of bitmap `m`, bit 0 first, as they are when the file is made.
pub(crate) type InitialWords<'a> = &'a dyn Fn(usize, u64) -> u64;

/// Where the sidecar of an image is, whether it exists or not.
#[derive(Debug)]
pub(crate) struct SidecarPlace {
    folder: File,
    /// For messages only.
    path: PathBuf,
    name: OsString,
    new_name: OsString,
}

impl SidecarPlace {
    /// The place beside an image. The image's own name is followed through links, so that every
    /// path to an image leads to the same sidecar.
    pub(crate) fn beside(image: &Path) -> io::Result<Self> {
        let image = std::fs::canonicalize(image)?;
        let (Some(folder), Some(name)) = (image.parent(), image.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let with = |suffix: &str| {
            let mut whole = name.to_owned();
            whole.push(OsStr::new(suffix));
            whole
        };
        let (name, new_name) = (with(SUFFIX), with(NEW_SUFFIX));
        Ok(Self { folder: File::open(folder)?, path: folder.join(&name), name, new_name })
    }

    /// As [`Home::create`].
    pub(super) fn create_file(
        &self,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<SidecarFile> {
        self.make_new(|file| self.fill_and_rename(file, description, words))
    }

    /// Makes a new, locked file under the name for those that are not finished; it is gone again if
    /// what is done with it fails.
    fn make_new<T>(&self, fill: impl FnOnce(File) -> io::Result<T>) -> io::Result<T> {
        self.unlink(&self.new_name)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR;
        let new = rustix::fs::openat(&self.folder, &*self.new_name, flags | OFlags::CLOEXEC, mode)?;
        let file = File::from(new);
        // Umask cannot be relied on to leave the mode alone, nor a default ACL.
        let made = rustix::fs::fchmod(&file, mode)
            .map_err(io::Error::from)
            .and_then(|()| file.try_lock().map_err(io::Error::from))
            .and_then(|()| fill(file));
        if made.is_err() {
            let _ = self.unlink(&self.new_name);
        }
        made
    }

    fn fill_and_rename(
        &self,
        file: File,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<SidecarFile> {
        let mut description = description.clone();
        let made = nanoseconds(file.metadata()?.modified()?);
        if made.abs_diff(now_nanoseconds()) > CLOCK_NANOSECONDS {
            // The times of files are not ours here, so they say nothing about who wrote when.
            description.image.modified = 0;
        }
        let length = write_new(&file, &description, words)?;
        if description.survives == Survives::PowerLoss {
            file.sync_all()?;
        }
        let map = WordMap::new(&file, length)?;
        rustix::fs::renameat(&self.folder, &*self.new_name, &self.folder, &*self.name)?;
        self.folder.sync_all()?;
        let inode = file.metadata()?.ino();
        let place = Self {
            folder: self.folder.try_clone()?,
            path: self.path.clone(),
            name: self.name.clone(),
            new_name: self.new_name.clone(),
        };
        Ok(SidecarFile { place, file, inode, map })
    }

    /// As [`Home::open`]. The file is locked while it is open.
    pub(super) fn open_file(&self, access: Access) -> io::Result<Option<FoundFile>> {
        let mode = match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        let flags = mode | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: OwnedFd =
            match rustix::fs::openat(&self.folder, &*self.name, flags, Mode::empty()) {
                Err(Errno::NOENT) => return Ok(None),
                other => other?,
            };
        let file = File::from(file);
        if !file.metadata()?.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        lock(&file, access)?;
        Ok(Some(FoundFile(file)))
    }

    fn unlink(&self, name: &OsStr) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.folder, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            other => other.map_err(io::Error::from),
        }
    }
}

impl Home for SidecarPlace {
    fn create(
        &self,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<Box<dyn Store>> {
        Ok(Box::new(self.create_file(description, words)?))
    }

    fn open(&self, access: Access) -> io::Result<Option<Box<dyn FoundBytes>>> {
        let found = self.open_file(access)?;
        Ok(found.map(|file| Box::new(file) as Box<dyn FoundBytes>))
    }

    fn remove(&self) -> io::Result<()> {
        self.unlink(&self.name)?;
        self.folder.sync_all()
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn probe(&self, description: &Description) -> io::Result<()> {
        let length = Layout::of(description).ok_or(io::ErrorKind::InvalidInput)?.length;
        self.make_new(|file| {
            allocate(&file, length)?;
            WordMap::new(&file, length)?;
            self.unlink(&self.new_name)
        })
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
        // Closing is not enough: a process forked a moment ago by another thread still has the
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

impl Store for SidecarFile {
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
        match rustix::fs::statat(&self.place.folder, &*self.place.name, flags) {
            // A newer epoch has taken the place, or somebody else has.
            Ok(found) if found.st_ino != self.inode => Ok(()),
            Ok(_) => self.place.remove(),
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Fills an empty file; returns its length, which never changes.
fn write_new(file: &File, description: &Description, words: InitialWords<'_>) -> io::Result<u64> {
    let layout = Layout::of(description).ok_or(io::ErrorKind::InvalidInput)?;
    allocate(file, layout.length)?;
    write_all(description, &layout, words, &mut |offset, bytes| file.write_all_at(bytes, offset))?;
    Ok(layout.length)
}

/// Writes everything that is not zero.
pub(super) fn write_all(
    description: &Description,
    layout: &Layout,
    words: InitialWords<'_>,
    write: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    write(0, &layout::encode_header(description, layout.length))?;
    write(layout::LIVENESS_WORD as u64 * 8, &now_nanoseconds().to_le_bytes())?;
    for slot in 0..description.log.slots {
        let empty = layout::encode_slot(0, description.epoch, &[]);
        write(LOG_OFFSET + (slot * SLOT_BYTES) as u64, &empty)?;
    }
    write(DESCRIPTORS_OFFSET, &layout::encode_descriptors(description))?;
    const WORDS_AT_A_TIME: u64 = 512;
    for (number, bitmap) in description.bitmaps.iter().enumerate() {
        let count = bitmap.word_count();
        for first in (0..count).step_by(WORDS_AT_A_TIME as usize) {
            let some = first..count.min(first + WORDS_AT_A_TIME);
            let bytes: Vec<u8> = some.flat_map(|n| words(number, n).to_le_bytes()).collect();
            if bytes.iter().any(|byte| *byte != 0) {
                write(layout.word_offsets[number] + first * 8, &bytes)?;
            }
        }
    }
    Ok(())
}

/// Gives a file its length and its space: a store into a mapped hole of a full disk kills the
/// process.
fn allocate(file: &File, length: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, length) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) if is_not_supported(&error.into()) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let zeroes = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < length {
        let part = (length - offset).min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..part as usize], offset)?;
        offset += part;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
