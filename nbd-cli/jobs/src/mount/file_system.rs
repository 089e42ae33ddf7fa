//! What a file system in a partition is asked for.

use std::time::SystemTime;

use fuser::Errno;

/// Most entries of a directory that are listed.
pub(super) const MAX_ENTRIES: usize = 1 << 20;

/// Kinds of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    File,
    Directory,
    Symlink,
    /// A device, a pipe or a socket: an empty file here.
    Other,
}

/// What is known about a file.
#[derive(Clone, Debug)]
pub(super) struct FileInfo {
    pub(super) kind: FileKind,
    pub(super) size: u64,
    pub(super) mode: u16,
    pub(super) user: u32,
    pub(super) group: u32,
    pub(super) modified: SystemTime,
}

/// An entry of a directory.
pub(super) type Name = (Vec<u8>, FileKind);

/// A file system. Paths are names joined by `/`, and empty for the root.
pub(super) trait FileSystem {
    fn info(&mut self, path: &[u8]) -> Result<FileInfo, Errno>;
    fn list(&mut self, path: &[u8]) -> Result<Vec<Name>, Errno>;
    fn link(&mut self, path: &[u8]) -> Result<Vec<u8>, Errno>;
    /// Reads up to `length` bytes; fewer only at the end of the file.
    fn read(&mut self, path: &[u8], offset: u64, length: usize) -> Result<Vec<u8>, Errno>;
}

/// A file system that cannot be opened: every request fails.
pub(super) struct Unreadable;

impl FileSystem for Unreadable {
    fn info(&mut self, path: &[u8]) -> Result<FileInfo, Errno> {
        if !path.is_empty() {
            return Err(Errno::EIO);
        }
        // The directory is there, so that a listing of what is around it works.
        Ok(FileInfo {
            kind: FileKind::Directory,
            size: 0,
            mode: 0o555,
            user: 0,
            group: 0,
            modified: SystemTime::UNIX_EPOCH,
        })
    }

    fn list(&mut self, _: &[u8]) -> Result<Vec<Name>, Errno> {
        Err(Errno::EIO)
    }

    fn link(&mut self, _: &[u8]) -> Result<Vec<u8>, Errno> {
        Err(Errno::EIO)
    }

    fn read(&mut self, _: &[u8], _: u64, _: usize) -> Result<Vec<u8>, Errno> {
        Err(Errno::EIO)
    }
}
