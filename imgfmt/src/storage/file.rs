//! Regular files and block devices.

mod begun;
mod extend;
mod open;
mod zeroes;

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::alignment::DirectAlignment;
use super::direct::Direct;
use super::known_data::KnownData;
use super::opening::identity_from;
use super::write_behind::{Backlog, Pages, WriteBehind};
use super::writers::OnlyWriter;
use super::{
    BegunWrite, Capabilities, Durability, FileIdentity, Speed, Storage, StorageExtent, TryRead,
    ZeroMode, durable,
};
use crate::cache_mode::CacheMode;
use crate::extent::ExtentKind;
use crate::sys;
use crate::units::HostOffset;

/// A regular file or a block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    kind: Kind,
    identity: FileIdentity,
    preferred_size: u32,
    cache: CacheMode,
    /// Present in the modes that bypass the page cache.
    direct: Option<Box<Direct>>,
    lacks_locks: bool,
    /// Operations that this file system was found to lack; they are not tried again.
    lacks: Lacks,
    known_data: Arc<KnownData>,
    /// Present if it is open for writing.
    only_writer: Option<OnlyWriter>,
    /// Present if it is written once.
    pub(super) write_behind: Option<Box<WriteBehind>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Regular,
    BlockDevice {
        /// The alignment of zeroes and discards, in bytes.
        logical_block_size: u64,
    },
}

#[derive(Debug, Default)]
struct Lacks {
    punch_hole: AtomicBool,
    zero_range: AtomicBool,
    no_wait: AtomicBool,
    seek_hole: AtomicBool,
    /// Whether space is not to be allocated before writes.
    allocation: AtomicBool,
}

/// The locks of a file, for a program that opens it otherwise. They end when it is dropped.
#[derive(Debug)]
pub struct FileLock {
    _storage: FileStorage,
}

impl FileStorage {
    /// Keeps the locks, and lets this process open the file for writing, with
    /// [`Locking::Off`](crate::Locking::Off).
    #[must_use]
    pub fn into_lock(mut self) -> FileLock {
        self.only_writer = None;
        FileLock { _storage: self }
    }

    /// Declares that the file is written once, from its start to its end or nearly so, as a copy
    /// is. What was written is then written back early, and its pages in the page cache are given
    /// up. Errors of that are errors of later writes and of [`sync`](Storage::sync). When writes
    /// are durable does not change.
    #[must_use]
    pub fn written_once(mut self, backlog: Backlog) -> Self {
        // Through a descriptor of its own: the file is closed before.
        if self.direct.is_none()
            && let Ok(file) = self.file.try_clone()
        {
            self.write_behind = Some(Box::new(WriteBehind::new(Arc::new(file), backlog)));
            self.lacks.allocation.store(!self.is_on_ext4(), Relaxed);
        }
        self
    }

    /// Returns whether locks were requested, but the file system does not support them.
    pub fn lacks_locks(&self) -> bool {
        self.lacks_locks
    }

    /// The identity of a file that is not opened; `None` if it cannot be examined.
    pub(crate) fn identity_of(path: &Path) -> Option<FileIdentity> {
        std::fs::metadata(path).ok().map(|metadata| identity_from(&metadata))
    }

    /// Whether the system reports the holes of this kind of file.
    fn may_have_holes(&self) -> bool {
        self.kind == Kind::Regular && !self.lacks.seek_hole.load(Relaxed)
    }

    /// The length of the file, and the offset up to which it has no hole. Searched only if the file
    /// occupies its complete length: otherwise there is a hole.
    fn look_for_holes(&self) -> (u64, u64) {
        let Ok(metadata) = self.file.metadata() else { return (0, 0) };
        let length = metadata.len();
        if metadata.blocks().saturating_mul(512) < length {
            return (length, 0);
        }
        (length, rustix::fs::seek(&self.file, SeekFrom::Hole(0)).unwrap_or(0))
    }
}

impl Pages for File {
    fn give_up(&self, range: Range<u64>) {
        let length = NonZeroU64::new(range.end - range.start);
        let _ = rustix::fs::fadvise(self, range.start, length, Advice::DontNeed);
    }

    fn wait(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn check(&self) -> io::Result<()> {
        sys::check_writeback(self.as_fd())
    }
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        // Before the locks: another program that gets them may write. Nothing is written any more,
        // and the inode number of a deleted file is free as soon as it is closed.
        self.only_writer = None;
        // Closing is not enough: a process that another thread has just forked keeps the
        // descriptor, and with it the locks, until it executes its program.
        let _ = sys::unlock(self.file.as_fd());
    }
}

impl Storage for FileStorage {
    fn len(&self) -> io::Result<u64> {
        match self.kind {
            Kind::Regular => Ok(self.file.metadata()?.len()),
            Kind::BlockDevice { .. } => Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?),
        }
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(direct) = &self.direct {
            return direct.read_at(offset.bytes(), buffer);
        }
        let mut done = 0;
        while done < buffer.len() {
            let position = offset.bytes().saturating_add(done as u64);
            match self.file.read_at(&mut buffer[done..], position) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        let durability = if self.cache.syncs() { durability } else { Durability::Cached };
        match (&self.direct, durability) {
            (Some(direct), _) => {
                direct.write_at(&self.file, || self.len(), offset.bytes(), data, durability)?;
            }
            (None, Durability::Cached) => {
                self.allocate_for(offset.bytes(), data.len() as u64);
                self.file.write_all_at(data, offset.bytes())?;
            }
            (None, Durability::Fua) => {
                durable::write_all(&self.file, offset.bytes(), data, 1, durability)?;
            }
        }
        self.known_data.insert(offset.bytes(), data.len() as u64);
        match &self.write_behind {
            Some(behind) => behind.wrote(offset.bytes(), data.len() as u64),
            None => Ok(()),
        }
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        match self.kind {
            Kind::Regular => {
                let _held = self.direct.as_deref().map(|direct| direct.hold_end(length));
                let resized = self.file.set_len(length);
                // A truncated part becomes a hole if the file grows again.
                self.known_data.remove(length, u64::MAX - length);
                resized
            }
            Kind::BlockDevice { .. } => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn extend(&self, length: u64) -> io::Result<()> {
        self.extend_direct(length)
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        let (mode, lacking) = (FallocateFlags::PUNCH_HOLE, &self.lacks.punch_hole);
        self.fallocate_zeroes(mode, lacking, offset.bytes(), length)
    }

    fn sync(&self) -> io::Result<()> {
        if self.cache.syncs() {
            self.file.sync_data()?;
        }
        // A write may have been told the error instead, and the system tells it once.
        self.write_behind.as_ref().map_or(Ok(()), |behind| behind.check())
    }

    fn capabilities(&self) -> Capabilities {
        let can_punch = !self.lacks.punch_hole.load(Relaxed);
        let minimum_size = match self.kind {
            Kind::Regular => self.direct_alignment().map_or(1, |alignment| alignment.offset),
            Kind::BlockDevice { logical_block_size } => {
                u32::try_from(logical_block_size).unwrap_or(512)
            }
        };
        Capabilities {
            fast_zero: can_punch,
            discard: can_punch,
            minimum_size,
            preferred_size: self.preferred_size,
        }
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        if self.direct.is_some() || self.lacks.no_wait.load(Relaxed) {
            return Ok(TryRead::WouldBlock);
        }
        let wanted = buffer.len();
        let mut buffers = [IoSliceMut::new(buffer)];
        let flags = ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(&self.file, &mut buffers, offset.bytes(), flags) {
            Ok(read) if read == wanted => Ok(TryRead::Complete),
            // A part was in memory, or the file has become shorter: the blocking read finds out.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(TryRead::WouldBlock),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.lacks.no_wait.store(true, Relaxed);
                Ok(TryRead::WouldBlock)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn write_zeroes(
        &self,
        offset: HostOffset,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
    ) -> io::Result<()> {
        if mode == ZeroMode::MayUnmap {
            match self.punch_hole(offset, length) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                other => return other,
            }
        }
        // On a device the kernel falls back to writing by itself, which is not fast.
        let zero_range_may_be_slow = matches!(self.kind, Kind::BlockDevice { .. });
        if speed == Speed::Any || !zero_range_may_be_slow {
            let (flags, lacking) = (FallocateFlags::ZERO_RANGE, &self.lacks.zero_range);
            match self.fallocate_zeroes(flags, lacking, offset.bytes(), length) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                other => return other,
            }
        }
        match speed {
            Speed::FastOnly => Err(io::ErrorKind::Unsupported.into()),
            Speed::Any => self.write_zeroes_as_data(offset, length),
        }
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        let all_data = StorageExtent { length, kind: ExtentKind::Data };
        if !self.may_have_holes() {
            return Ok(all_data);
        }
        self.known_data.first_look(|| self.look_for_holes());
        let offset = offset.bytes();
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            Err(Errno::NXIO) => {
                // No data up to the end, or the end is before the offset: then a read must report
                // it.
                let end = self.len()?;
                return Ok(match end.checked_sub(offset) {
                    Some(rest) if rest > 0 => {
                        StorageExtent { length: rest.min(length), kind: ExtentKind::Hole }
                    }
                    _ => all_data,
                });
            }
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                self.lacks.seek_hole.store(true, Relaxed);
                return Ok(all_data);
            }
            Err(error) => return Err(error.into()),
        };
        if data > offset {
            let length = length.min(data - offset);
            return Ok(StorageExtent { length, kind: ExtentKind::Hole });
        }
        match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => {
                self.known_data.insert(offset, hole - offset);
                Ok(StorageExtent { length: length.min(hole - offset), kind: ExtentKind::Data })
            }
            // The file changed between the two calls; "data" is always correct.
            Ok(_) | Err(Errno::NXIO) => Ok(all_data),
            Err(error) => Err(error.into()),
        }
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        !self.may_have_holes() || self.known_data.contains(offset.bytes(), length)
    }

    fn readahead(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        if self.direct.is_some() {
            return Ok(()); // What would be read ahead into is passed by.
        }
        let length = NonZeroU64::new(length);
        Ok(rustix::fs::fadvise(&self.file, offset.bytes(), length, Advice::WillNeed)?)
    }

    fn allocated_len(&self) -> io::Result<Option<u64>> {
        match self.kind {
            Kind::Regular => Ok(Some(self.file.metadata()?.blocks() * 512)),
            Kind::BlockDevice { .. } => Ok(None),
        }
    }

    fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.direct.as_deref().map(Direct::alignment)
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.direct.as_deref().map_or(self.file.as_fd(), Direct::as_fd))
    }

    fn begin_write(&self, offset: HostOffset, length: u64) -> Option<Box<dyn BegunWrite>> {
        self.begin_direct(offset.bytes(), length)
    }

    fn identity(&self) -> Option<FileIdentity> {
        Some(self.identity)
    }
}
