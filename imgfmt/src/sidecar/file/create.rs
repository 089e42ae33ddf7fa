//! Creates the file: completely, under another name, and then renames it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use super::{CLOCK_NANOSECONDS, NEW_MODE, NEW_NAMES, SidecarFile, SidecarPlace};
use crate::access::BitmapDurability;
use crate::error::is_not_supported;
use crate::sidecar::clock::{nanoseconds, now_nanoseconds};
use crate::sidecar::layout::{
    self, DESCRIPTORS_OFFSET, Description, LOG_OFFSET, Layout, SLOT_BYTES,
};
use crate::sidecar::location::InitialWords;
use crate::sidecar::map::WordMap;

impl SidecarPlace {
    /// As [`SidecarLocation::create`].
    pub(in crate::sidecar) fn create_file(
        &self,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<SidecarFile> {
        self.make_new(|file, new_name| self.fill_and_rename(file, new_name, description, words))
    }

    /// Creates a new, locked file under a name for unfinished files, and removes it again if `fill`
    /// fails.
    fn make_new<T>(&self, fill: impl FnOnce(File, &OsStr) -> io::Result<T>) -> io::Result<T> {
        let (file, new_name) = self.open_new()?;
        // The umask and a default ACL may have changed the mode.
        let made = rustix::fs::fchmod(&file, NEW_MODE)
            .map_err(io::Error::from)
            .and_then(|()| file.try_lock().map_err(io::Error::from))
            .and_then(|()| fill(file, &new_name));
        if made.is_err() {
            let _ = self.unlink(&new_name);
        }
        made
    }

    /// Creates an empty file. The remains of a crash under its name are removed.
    fn open_new(&self) -> io::Result<(File, OsString)> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mut number = 0;
        loop {
            let mut name = self.new_name.clone();
            if number > 0 {
                name.push(format!(".{number}"));
            }
            let made = self.unlink(&name).and_then(|()| {
                let new =
                    rustix::fs::openat(&self.directory, &*name, flags | OFlags::CLOEXEC, NEW_MODE);
                new.map_err(io::Error::from)
            });
            match made {
                Ok(file) => return Ok((File::from(file), name)),
                // Another user's file, or a directory: try another name.
                Err(_) if number < NEW_NAMES && self.is_there(&name) => number += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// As [`SidecarLocation::probe`](crate::sidecar::location::SidecarLocation::probe).
    pub(super) fn create_and_remove(&self, description: &Description) -> io::Result<()> {
        let length = Layout::of(description).ok_or(io::ErrorKind::InvalidInput)?.length;
        self.refuse_what_is_in_the_way()?;
        self.make_new(|file, new_name| {
            allocate(&file, length)?;
            WordMap::new(&file, length)?;
            self.unlink(new_name)
        })
    }

    fn fill_and_rename(
        &self,
        file: File,
        new_name: &OsStr,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<SidecarFile> {
        let mut description = description.clone();
        let made = nanoseconds(file.metadata()?.modified()?);
        if made.abs_diff(now_nanoseconds()) > CLOCK_NANOSECONDS {
            // Another clock sets the times of files here, so they do not identify the last writer.
            description.image.modified = 0;
        }
        let length = write_new(&file, &description, words)?;
        if description.durability == BitmapDurability::PowerLoss {
            file.sync_all()?;
        }
        let map = WordMap::new(&file, length)?;
        rustix::fs::renameat(&self.directory, new_name, &self.directory, &*self.name)
            .map_err(|error| self.refuse_what_is_in_the_way().err().unwrap_or(error.into()))?;
        self.directory.sync_all()?;
        let inode = file.metadata()?.ino();
        let place = Self {
            directory: self.directory.try_clone()?,
            path: self.path.clone(),
            name: self.name.clone(),
            new_name: self.new_name.clone(),
            image_owner: self.image_owner,
        };
        Ok(SidecarFile { place, file, inode, map })
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
pub(in crate::sidecar) fn write_all(
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

/// Sets the length of a file and allocates its space: a store into a mapped hole on a full disk
/// kills the process.
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
