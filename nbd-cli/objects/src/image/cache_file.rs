//! The files of the cache: blocks of data, and an index of what they are.
//!
//! `blocks` has slots of equal length; `index` has a header and an entry of 64 bytes for each slot:
//!
//! | bytes | contents |
//! |---|---|
//! | 0..16 | the object: a digest of its address, ETag and length |
//! | 16..24 | the number of the block in the object |
//! | 24..28 | its length in bytes |
//! | 28..32 | CRC-32 of its data |
//! | 60..64 | CRC-32 of the bytes before |
//!
//! Numbers are little-endian. Before a slot is overwritten, its entry is cleared; the new entry is
//! written after the data. Whatever a crash leaves of that, an entry that is complete has the sum
//! of the data that belongs to it, and data with another sum is not used.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

/// Length of a block, in bytes. The last block of an object may be shorter.
pub const BLOCK_LEN: usize = 256 << 10;

/// The first bytes of an index: the name and version of this layout.
const MAGIC: &[u8; 16] = b"nbd-objects 0001";

/// Length of the header, in bytes.
const HEADER_LEN: u64 = 4096;

/// Length of an entry, in bytes.
const ENTRY_LEN: usize = 64;

/// A block of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// A digest of the object's address, ETag and length.
    pub(super) object: [u8; 16],
    /// The number of the block.
    pub(super) block: u64,
}

/// An entry of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: Key,
    /// In bytes.
    pub(super) length: u32,
    /// CRC-32 of the data.
    pub(super) sum: u32,
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..16].copy_from_slice(&self.key.object);
        bytes[16..24].copy_from_slice(&self.key.block.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.sum.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Returns nothing for a cleared or damaged entry.
    fn from_bytes(bytes: &[u8; ENTRY_LEN]) -> Option<Self> {
        let word = |start: usize| {
            bytes[start..start + 4].try_into().map(u32::from_le_bytes).unwrap_or_default()
        };
        let object: [u8; 16] = bytes[..16].try_into().ok()?;
        let block = u64::from_le_bytes(bytes[16..24].try_into().ok()?);
        let (length, sum) = (word(24), word(28));
        let is_whole = word(60) == crc32fast::hash(&bytes[..60]);
        let is_possible = length > 0 && length as usize <= BLOCK_LEN;
        (is_whole && is_possible).then_some(Self { key: Key { object, block }, length, sum })
    }
}

/// The files of a cache.
#[derive(Debug)]
pub(super) struct CacheFile {
    blocks: File,
    /// Absent if the cache ends with the process.
    index: Option<File>,
}

impl CacheFile {
    /// Opens the cache in a directory, and returns its entries by slot. While another process uses
    /// that cache, it makes one that has no name and ends with this process.
    ///
    /// # Errors
    ///
    /// The directory or the files cannot be made or read.
    pub(super) fn open(directory: &Path, slots: usize) -> io::Result<(Self, Vec<Option<Entry>>)> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        check_private(&std::fs::metadata(directory)?)?;
        let open = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            // Somebody else's link is not followed.
            options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
            options.open(directory.join(name))
        };
        let index = open("index")?;
        if flock(&index, FlockOperation::NonBlockingLockExclusive).is_err() {
            tracing::debug!("another process uses the cache; this one has its own until it ends");
            return Ok((Self::unnamed(directory)?, Vec::new()));
        }
        let blocks = open("blocks")?;
        let mut entries = read_entries(&index)?;
        entries.truncate(slots);
        // A smaller limit than last time.
        let length = entries.len() as u64;
        index.set_len(HEADER_LEN + length * ENTRY_LEN as u64)?;
        blocks.set_len(blocks.metadata()?.len().min(length * BLOCK_LEN as u64))?;
        index.write_all_at(MAGIC, 0)?;
        Ok((Self { blocks, index: Some(index) }, entries))
    }

    /// Returns whether the cache stays when this process ends.
    pub(super) fn is_named(&self) -> bool {
        self.index.is_some()
    }

    /// Makes a cache that ends with this process.
    ///
    /// # Errors
    ///
    /// The directory is not writable.
    pub(super) fn unnamed(directory: &Path) -> io::Result<Self> {
        for number in 0..1000 {
            let path = directory.join(format!("blocks.{}.{number}", std::process::id()));
            let file =
                OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
            match file {
                Ok(blocks) => {
                    std::fs::remove_file(&path)?;
                    return Ok(Self { blocks, index: None });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Reads a part of a slot.
    pub(super) fn read(&self, slot: usize, offset: usize, buffer: &mut [u8]) -> io::Result<()> {
        self.blocks.read_exact_at(buffer, position(slot, offset))
    }

    /// Reads a part of a slot if it is in memory; returns whether it was.
    pub(super) fn try_read(&self, slot: usize, offset: usize, buffer: &mut [u8]) -> bool {
        let wanted = buffer.len();
        let mut buffers = [io::IoSliceMut::new(buffer)];
        let flags = rustix::io::ReadWriteFlags::NOWAIT;
        rustix::io::preadv2(&self.blocks, &mut buffers, position(slot, offset), flags)
            .is_ok_and(|read| read == wanted)
    }

    /// Replaces the contents of a slot.
    pub(super) fn write(&self, slot: usize, entry: Entry, data: &[u8]) -> io::Result<()> {
        self.forget(slot)?;
        self.blocks.write_all_at(data, position(slot, 0))?;
        match &self.index {
            Some(index) => index.write_all_at(&entry.to_bytes(), entry_position(slot)),
            None => Ok(()),
        }
    }

    /// Clears the entry of a slot.
    pub(super) fn forget(&self, slot: usize) -> io::Result<()> {
        match &self.index {
            Some(index) => index.write_all_at(&[0; ENTRY_LEN], entry_position(slot)),
            None => Ok(()),
        }
    }
}

/// Refuses a directory into which others can put blocks.
fn check_private(directory: &std::fs::Metadata) -> io::Result<()> {
    let is_ours = [0, rustix::process::geteuid().as_raw()].contains(&directory.uid());
    if is_ours && directory.mode() & 0o022 == 0 {
        return Ok(());
    }
    let why = "other users can write into it; give a directory of your own";
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

fn position(slot: usize, offset: usize) -> u64 {
    slot as u64 * BLOCK_LEN as u64 + offset as u64
}

fn entry_position(slot: usize) -> u64 {
    HEADER_LEN + slot as u64 * ENTRY_LEN as u64
}

/// Returns the entries of an index; none if it is of another version.
fn read_entries(index: &File) -> io::Result<Vec<Option<Entry>>> {
    let mut magic = [0; MAGIC.len()];
    match index.read_exact_at(&mut magic, 0) {
        Ok(()) if magic == *MAGIC => {}
        Ok(()) => return Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    let count = index.metadata()?.len().saturating_sub(HEADER_LEN) / ENTRY_LEN as u64;
    let mut entries = Vec::new();
    let mut buffer = [0; ENTRY_LEN * 1024];
    for first in (0..count).step_by(1024) {
        let part =
            &mut buffer[..ENTRY_LEN * usize::try_from(count - first).unwrap_or(1024).min(1024)];
        index.read_exact_at(part, HEADER_LEN + first * ENTRY_LEN as u64)?;
        let (chunks, _) = part.as_chunks::<ENTRY_LEN>();
        entries.extend(chunks.iter().map(Entry::from_bytes));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(block: u64) -> Entry {
        let key = Key { object: [7; 16], block };
        Entry { key, length: 3, sum: crc32fast::hash(b"abc") }
    }

    #[test]
    fn damaged_and_cleared_entries_are_none() {
        let bytes = entry(5).to_bytes();
        assert_eq!(Entry::from_bytes(&bytes), Some(entry(5)));
        assert_eq!(Entry::from_bytes(&[0; ENTRY_LEN]), None);
        for index in 0..ENTRY_LEN {
            let mut damaged = bytes;
            damaged[index] ^= 1;
            assert_eq!(Entry::from_bytes(&damaged), None, "byte {index}");
        }
    }

    #[test]
    fn entries_are_found_again_and_a_smaller_cache_has_fewer() {
        let directory = tempfile::tempdir().unwrap();
        let (file, entries) = CacheFile::open(directory.path(), 9).unwrap();
        assert!(entries.is_empty());
        for slot in 0..3 {
            file.write(slot, entry(slot as u64), b"abc").unwrap();
        }
        file.forget(1).unwrap();
        drop(file);
        let (file, entries) = CacheFile::open(directory.path(), 9).unwrap();
        assert_eq!(entries, [Some(entry(0)), None, Some(entry(2))]);
        drop(file);
        let (_, entries) = CacheFile::open(directory.path(), 1).unwrap();
        assert_eq!(entries, [Some(entry(0))]);
    }

    #[test]
    fn directory_into_which_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(directory.path(), open).unwrap();
        let error = CacheFile::open(directory.path(), 9).unwrap_err();
        assert!(error.to_string().contains("other users can write"), "{error}");
    }

    #[test]
    fn second_process_gets_a_cache_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let (first, _) = CacheFile::open(directory.path(), 9).unwrap();
        first.write(0, entry(0), b"abc").unwrap();
        let (second, entries) = CacheFile::open(directory.path(), 9).unwrap();
        assert!(entries.is_empty() && second.index.is_none());
        second.write(0, entry(1), b"xyz").unwrap();
        let mut buffer = [0; 3];
        first.read(0, 0, &mut buffer).unwrap();
        assert_eq!(&buffer, b"abc");
        let names = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(names, 2, "the second cache has no name");
    }
}
