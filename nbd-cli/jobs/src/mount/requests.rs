//! What the files of a mount are, and what is done with them.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{Errno, FileAttr, FileType, INodeNo, OpenFlags, ReplyDirectory};
use imgfmt::{Durability, ZeroMode};

use super::disk::{MountedDisk, Wanted};
use super::file_system::{FileInfo, FileKind};
use super::nodes::{Nodes, Place};
use super::tree::{FIRST_DYNAMIC, Kind, ROOT, Tree};
use super::volume::Volume;

/// The largest read of a request in bytes, and how far the kernel reads ahead.
pub(super) const MAX_READ: u32 = 1 << 20;
const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 0x10;
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;
/// `O_DSYNC`, which `O_SYNC` contains.
const SYNCHRONOUS: i32 = 0o10000;
/// The number of a file in a listing that has not been looked up.
const UNKNOWN: INodeNo = INodeNo(0xffff_ffff);

/// The files of a mount.
pub(super) struct MountedFiles {
    pub(super) disks: Vec<Arc<MountedDisk>>,
    pub(super) volumes: Vec<Volume>,
    pub(super) tree: Tree,
    pub(super) nodes: Nodes,
    /// The owner of disks and partitions.
    pub(super) owner: (u32, u32),
}

/// A file of the mount.
pub(super) enum Node<'a> {
    Directory(&'a [u64]),
    Part(&'a MountedDisk, Range<u64>),
    File(&'a Volume, Place),
}

impl MountedFiles {
    pub(super) fn node(&self, number: u64) -> Result<Node<'_>, Errno> {
        let place = if number >= FIRST_DYNAMIC {
            self.nodes.place(number).ok_or(Errno::ESTALE)?
        } else {
            let entry = self.tree.get(number).ok_or(Errno::ENOENT)?;
            match &entry.kind {
                Kind::Directory => return Ok(Node::Directory(&entry.children)),
                Kind::Part { disk, range } => {
                    let disk = self.disks.get(*disk).ok_or(Errno::ENOENT)?;
                    return Ok(Node::Part(disk, range.clone()));
                }
                Kind::Volume(volume) => Place { volume: *volume, path: Vec::new() },
            }
        };
        let volume = self.volumes.get(place.volume).ok_or(Errno::ENOENT)?;
        Ok(Node::File(volume, place))
    }

    /// A disk or partition, for a request that nothing else can have.
    fn part(&self, number: INodeNo) -> Result<(&MountedDisk, Range<u64>), Errno> {
        match self.node(number.0)? {
            Node::Part(disk, range) => Ok((disk, range)),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    pub(super) fn attributes(&self, number: u64) -> Result<FileAttr, Errno> {
        let modified = self.tree.get(number).map_or(SystemTime::UNIX_EPOCH, |entry| entry.modified);
        let mut info = FileInfo {
            kind: FileKind::Directory,
            size: 0,
            mode: 0o555,
            user: self.owner.0,
            group: self.owner.1,
            modified,
        };
        match self.node(number)? {
            Node::Directory(_) => {}
            Node::Part(disk, range) => {
                info.kind = FileKind::File;
                info.size = range.end - range.start;
                info.mode = if disk.is_writable() { 0o644 } else { 0o444 };
            }
            Node::File(volume, place) => info = volume.info(&place.path)?,
        }
        Ok(attributes(number, &info))
    }

    pub(super) fn look_up(&self, parent: u64, name: &OsStr) -> Result<FileAttr, Errno> {
        match self.node(parent)? {
            Node::Directory(_) => {
                let child = self.tree.child(parent, name).ok_or(Errno::ENOENT)?;
                self.attributes(child)
            }
            Node::Part(..) => Err(Errno::ENOTDIR),
            Node::File(volume, place) => {
                let child = place.child(name.as_bytes());
                let info = volume.info(&child.path)?;
                Ok(attributes(self.nodes.look_up(child), &info))
            }
        }
    }

    pub(super) fn read_bytes(&self, number: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let size = size.min(MAX_READ) as usize;
        match self.node(number)? {
            Node::Directory(_) => Err(Errno::EISDIR),
            Node::File(volume, place) => volume.read(&place.path, offset, size),
            Node::Part(disk, range) => {
                let Some(inside) = inside(&range, offset, size as u64) else {
                    return Ok(Vec::new());
                };
                // At most `size`.
                let mut bytes = vec![0; (inside.end - inside.start) as usize];
                disk.read(inside.start, &mut bytes)?;
                Ok(bytes)
            }
        }
    }

    pub(super) fn list(
        &self,
        number: u64,
        offset: u64,
        reply: &mut ReplyDirectory,
    ) -> Result<(), Errno> {
        let parent = self.tree.get(number).map_or(ROOT, |entry| entry.parent);
        let dots = [(number, "."), (parent, "..")];
        let dots = dots
            .map(|(number, name)| (INodeNo(number), FileType::Directory, name.as_bytes().to_vec()));
        let names: Vec<_> = match self.node(number)? {
            Node::Part(..) => return Err(Errno::ENOTDIR),
            Node::Directory(children) => {
                let entries = children.iter().filter_map(|child| {
                    let entry = self.tree.get(*child)?;
                    let kind = match entry.kind {
                        Kind::Part { .. } => FileType::RegularFile,
                        Kind::Directory | Kind::Volume(_) => FileType::Directory,
                    };
                    Some((INodeNo(*child), kind, entry.name.as_bytes().to_vec()))
                });
                entries.collect()
            }
            Node::File(volume, place) => {
                let names = volume.list(&place.path)?;
                names.into_iter().map(|(name, kind)| (UNKNOWN, file_type(kind), name)).collect()
            }
        };
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        let all = dots.into_iter().chain(names);
        for ((number, kind, name), next) in all.zip(1..).skip(skipped) {
            if reply.add(number, next, kind, OsStr::from_bytes(&name)) {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn seek(&self, number: INodeNo, offset: i64, whence: i32) -> Result<i64, Errno> {
        let offset = u64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let wanted = match whence {
            SEEK_DATA => Wanted::Data,
            SEEK_HOLE => Wanted::Hole,
            _ => return Err(Errno::EINVAL),
        };
        let (size, found) = match self.node(number.0)? {
            Node::Directory(_) => return Err(Errno::EINVAL),
            Node::Part(disk, range) => {
                let size = range.end - range.start;
                let start = range.start.checked_add(offset).filter(|start| *start < range.end);
                let start = start.ok_or(Errno::ENXIO)?;
                let found = disk.seek(start..range.end, wanted)?;
                (size, found.map(|found| found - range.start))
            }
            // All of a file is data.
            Node::File(volume, place) => {
                let size = volume.info(&place.path)?.size;
                if offset >= size {
                    return Err(Errno::ENXIO);
                }
                (size, (wanted == Wanted::Data).then_some(offset))
            }
        };
        let position = match (found, wanted) {
            (Some(found), _) => found,
            (None, Wanted::Hole) => size,
            (None, Wanted::Data) => return Err(Errno::ENXIO),
        };
        i64::try_from(position).map_err(|_| Errno::EOVERFLOW)
    }

    pub(super) fn write_bytes(
        &self,
        number: INodeNo,
        offset: u64,
        data: &[u8],
        flags: OpenFlags,
    ) -> Result<u32, Errno> {
        let (disk, range) = self.part(number)?;
        // As on a block device: up to its end, and nothing beyond.
        let inside = inside(&range, offset, data.len() as u64).ok_or(Errno::ENOSPC)?;
        let count = (inside.end - inside.start) as usize;
        let durability = match flags.0 & SYNCHRONOUS {
            0 => Durability::Cached,
            _ => Durability::Fua,
        };
        disk.write(inside.start, data.get(..count).unwrap_or_default(), durability)?;
        u32::try_from(count).map_err(|_| Errno::EINVAL)
    }

    pub(super) fn allocate(&self, number: INodeNo, at: Range<u64>, mode: i32) -> Result<(), Errno> {
        let (disk, range) = self.part(number)?;
        let zero_mode = match mode & !KEEP_SIZE {
            PUNCH_HOLE => ZeroMode::MayUnmap,
            ZERO_RANGE => ZeroMode::KeepAllocated,
            _ => return Err(Errno::EOPNOTSUPP),
        };
        let length = at.end.saturating_sub(at.start);
        match inside(&range, at.start, length) {
            Some(inside) => disk.write_zeroes(inside, zero_mode),
            None => Ok(()),
        }
    }
}

/// Returns the place on the disk of a range of a part of it, cut at the end of the part; `None` if
/// nothing of it is inside.
fn inside(part: &Range<u64>, offset: u64, length: u64) -> Option<Range<u64>> {
    let start = part.start.checked_add(offset)?;
    let end = start.checked_add(length)?.min(part.end);
    (start < end).then_some(start..end)
}

fn attributes(number: u64, info: &FileInfo) -> FileAttr {
    let is_directory = info.kind == FileKind::Directory;
    FileAttr {
        ino: INodeNo(number),
        size: info.size,
        blocks: info.size.div_ceil(512),
        atime: info.modified,
        mtime: info.modified,
        ctime: info.modified,
        crtime: info.modified,
        kind: file_type(info.kind),
        perm: info.mode & 0o7777,
        nlink: if is_directory { 2 } else { 1 },
        uid: info.user,
        gid: info.group,
        rdev: 0,
        blksize: 128 << 10,
        flags: 0,
    }
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::File | FileKind::Other => FileType::RegularFile,
    }
}
