//! ext2, ext3 and ext4.

use std::error::Error;
use std::time::{Duration, SystemTime};

use ext4_view::{Ext4, Ext4Error, Ext4Read, File, FileType, Metadata};
use fuser::Errno;

use super::file_system::{FileInfo, FileKind, FileSystem, MAX_ENTRIES, Name, Unreadable};
use super::part_reader::PartReader;

/// Files that are kept open where they were read last: the kernel reads ahead with several threads.
const MAX_OPEN: usize = 16;
/// Largest number of block groups that is believed: a file system of 128 TiB has it. The crate
/// allocates for them before it reads them.
const MAX_GROUPS: u64 = 1 << 20;
/// Files are read below this offset: to reach a block takes time in proportion to its number.
const MAX_OFFSET: u64 = 1 << 40;
/// Longest target of a symbolic link that Linux follows.
const MAX_LINK_LEN: u64 = 4096;

impl Ext4Read for PartReader {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        Ok(self.fill(start_byte, dst)?)
    }
}

struct ExtVolume {
    system: Ext4,
    open: Vec<(Vec<u8>, File)>,
}

/// Opens the file system and hands it to `serve`.
pub(super) fn open(mut reader: PartReader, serve: impl FnOnce(&mut dyn FileSystem)) {
    let is_sound = has_sound_groups(&mut reader);
    match Ext4::load(Box::new(reader)) {
        Ok(system) if is_sound => serve(&mut ExtVolume { system, open: Vec::new() }),
        _ => serve(&mut Unreadable),
    }
}

/// Checks the number of block groups in the superblock.
fn has_sound_groups(reader: &mut PartReader) -> bool {
    let mut block = [0; 0x154];
    if reader.fill(1024, &mut block).is_err() {
        return false;
    }
    let word = |at: usize| {
        let bytes = block.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u64::from(bytes.map_or(0, u32::from_le_bytes))
    };
    let has_64_bits = word(0x60) & 0x80 != 0;
    let blocks = word(0x4) | if has_64_bits { word(0x150) << 32 } else { 0 };
    let per_group = word(0x20);
    per_group > 0 && blocks.div_ceil(per_group) <= MAX_GROUPS
}

impl ExtVolume {
    /// Returns the file, at the offset.
    fn file_at(&mut self, path: &[u8], offset: u64) -> Result<File, Errno> {
        let here = |(opened, file): &(Vec<u8>, File)| opened == path && file.position() == offset;
        if let Some(index) = self.open.iter().position(here) {
            return Ok(self.open.remove(index).1);
        }
        let mut file = self.system.open(absolute(path).as_slice()).map_err(number)?;
        // Time in proportion to the offset is not spent on what is beyond the end.
        if offset < file.metadata().len() {
            file.seek_to(offset).map_err(number)?;
        }
        Ok(file)
    }
}

impl FileSystem for ExtVolume {
    fn info(&mut self, path: &[u8]) -> Result<FileInfo, Errno> {
        let metadata = self.system.symlink_metadata(absolute(path).as_slice()).map_err(number)?;
        Ok(info(&metadata))
    }

    fn list(&mut self, path: &[u8]) -> Result<Vec<Name>, Errno> {
        let mut names = Vec::new();
        for entry in self.system.read_dir(absolute(path).as_slice()).map_err(number)? {
            let entry = entry.map_err(number)?;
            if names.len() >= MAX_ENTRIES {
                return Err(Errno::EOVERFLOW);
            }
            let kind = entry.file_type().map_or(FileKind::Other, kind);
            names.push((entry.file_name().as_ref().to_vec(), kind));
        }
        Ok(names)
    }

    fn link(&mut self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = absolute(path);
        let metadata = self.system.symlink_metadata(path.as_slice()).map_err(number)?;
        // The crate allocates as much as the inode says.
        if metadata.len() > MAX_LINK_LEN {
            return Err(Errno::ENAMETOOLONG);
        }
        let target = self.system.read_link(path.as_slice()).map_err(number)?;
        Ok(target.as_ref().to_vec())
    }

    fn read(&mut self, path: &[u8], offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        if offset >= MAX_OFFSET {
            return Err(Errno::EFBIG);
        }
        let mut file = self.file_at(path, offset)?;
        if file.position() != offset {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; length];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match file.read_bytes(rest).map_err(number)? {
                0 => break,
                count => filled += count,
            }
        }
        bytes.truncate(filled);
        if self.open.len() >= MAX_OPEN {
            self.open.remove(0);
        }
        self.open.push((path.to_vec(), file));
        Ok(bytes)
    }
}

fn absolute(path: &[u8]) -> Vec<u8> {
    [b"/", path].concat()
}

fn info(metadata: &Metadata) -> FileInfo {
    let modified = metadata.modified();
    let seconds = Duration::from_secs(modified.seconds().unsigned_abs());
    let whole = match modified.seconds() {
        ..0 => SystemTime::UNIX_EPOCH.checked_sub(seconds),
        _ => SystemTime::UNIX_EPOCH.checked_add(seconds),
    };
    let nanoseconds = Duration::from_nanos(modified.nanoseconds().into());
    let exact = whole.and_then(|whole| whole.checked_add(nanoseconds));
    let kind = kind(metadata.file_type());
    FileInfo {
        kind,
        size: if kind == FileKind::Other { 0 } else { metadata.len() },
        mode: metadata.mode(),
        user: metadata.uid(),
        group: metadata.gid(),
        modified: exact.unwrap_or(SystemTime::UNIX_EPOCH),
    }
}

fn kind(kind: FileType) -> FileKind {
    match kind {
        FileType::Regular => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        _ => FileKind::Other,
    }
}

#[allow(clippy::needless_pass_by_value)] // For map_err.
fn number(error: Ext4Error) -> Errno {
    match error {
        Ext4Error::NotFound => Errno::ENOENT,
        Ext4Error::NotADirectory => Errno::ENOTDIR,
        Ext4Error::IsADirectory => Errno::EISDIR,
        Ext4Error::NotASymlink | Ext4Error::IsASpecialFile => Errno::EINVAL,
        Ext4Error::Encrypted => Errno::EACCES,
        _ => Errno::EIO,
    }
}
