//! Transfers that bypass the page cache.
//!
//! The file is open twice: with O_DIRECT for complete blocks, and without it for everything else
//! (locks, lengths, holes, syncs). Requests and memory that are not aligned go through aligned
//! buffers. A block that is written in part is read, changed and written back, and no other thread
//! of this process changes it meanwhile. Where the file ends within a block, that block is written
//! through the page cache: direct I/O could only write all of it, and would make the file longer
//! for a moment. The kernel keeps the two coherent: a direct transfer first has the pages of its
//! range written, and a direct write has them dropped.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::alignment::DirectAlignment;
use super::bounce::{BouncePool, LARGE};
use super::durable;
use super::opening::{identity_from, open_error};
use super::range_locks::{RangeGuard, RangeLocks};
use super::{Durability, FileIdentity};
use crate::access::Access;
use crate::error::{Error, ErrorKind, Result};

/// Unit of the locks of writes that may go through the page cache, in bytes: no page is larger.
const PAGE_MAX: u64 = 64 * 1024;
/// Alignment of our own buffers in bytes, at least.
const MEMORY_ALIGNMENT: usize = 4096;

/// A file that is open for direct I/O.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    alignment: DirectAlignment,
    locks: Arc<RangeLocks>,
    pool: BouncePool,
}

impl Direct {
    /// Opens a file, which is open already, for direct I/O.
    ///
    /// # Errors
    ///
    /// `Unsupported` if it has none.
    pub(super) fn open(
        path: &Path,
        access: Access,
        identity: FileIdentity,
        device_block: Option<u64>,
    ) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::ReadWrite);
        options.custom_flags((OFlags::DIRECT | OFlags::NONBLOCK).bits() as i32);
        let file = match options.open(path) {
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                return Err(no_direct_io(path));
            }
            file => file.map_err(open_error(path))?,
        };
        let metadata = file.metadata().map_err(open_error(path))?;
        if identity_from(&metadata) != identity {
            let detail = "another program put another file in its place meanwhile; try again";
            return Err(Error::new(ErrorKind::Busy, "open", detail).with_path(path));
        }
        let alignment = DirectAlignment::of(&file, device_block).map_err(open_error(path))?;
        let alignment = alignment.ok_or_else(|| no_direct_io(path))?;
        let memory = MEMORY_ALIGNMENT.max(alignment.memory as usize);
        let (locks, pool) = (Arc::default(), BouncePool::new(memory));
        Ok(Self { file, alignment, locks, pool })
    }

    pub(super) fn alignment(&self) -> DirectAlignment {
        self.alignment
    }

    /// The descriptor with O_DIRECT.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Prevents read-modify-write of blocks of a range while the caller changes it in another way.
    pub(super) fn hold(&self, range: Range<u64>) -> RangeGuard {
        self.locks.shared(self.floor(range.start)..self.ceil(range.end).unwrap_or(u64::MAX))
    }

    /// Prevents other changes of the blocks of a range while the caller writes them through
    /// [`as_fd`](Self::as_fd); `None` if that needs waiting, or if they are not complete blocks.
    pub(super) fn try_hold_blocks(&self, range: Range<u64>) -> Option<RangeGuard> {
        let is_aligned = [range.start, range.end].iter().all(|at| at.is_multiple_of(self.block()));
        if is_aligned { self.locks.try_shared(range) } else { None }
    }

    /// Prevents changes from `start` on, while the length of the file changes.
    pub(super) fn hold_end(&self, start: u64) -> RangeGuard {
        self.locks.exclusive(start / PAGE_MAX * PAGE_MAX..u64::MAX)
    }

    /// Reads until `buffer` is full or the file ends; returns the number of bytes read.
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..)
            && !rest.is_empty()
        {
            let position = offset.saturating_add(done as u64);
            let blocks = rest.len() - rest.len() % self.block() as usize;
            let is_aligned = position.is_multiple_of(self.block()) && self.suits(rest);
            let read = match (is_aligned, rest.get_mut(..blocks)) {
                (true, Some(blocks)) if !blocks.is_empty() => self.read_some(position, blocks)?,
                _ => self.read_bounced(position, rest)?,
            };
            if read == 0 {
                break;
            }
            done += read;
        }
        Ok(done)
    }

    /// Writes all of `data`. `file` is the same file without O_DIRECT, and `length` returns its
    /// length, which does not shrink while a lock is held.
    pub(super) fn write_at(
        &self,
        file: &File,
        length: impl FnOnce() -> io::Result<u64>,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let end = offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let blocks = self.floor(offset)..self.ceil(end)?;
        if blocks == (offset..end) {
            let _held = self.locks.shared(blocks);
            return self.write_blocks(file, offset, data, durability);
        }
        let first_page = offset / PAGE_MAX * PAGE_MAX;
        let last_page = end.checked_next_multiple_of(PAGE_MAX).unwrap_or(u64::MAX);
        let _held = self.locks.exclusive(first_page..last_page);
        let length = length()?;
        if blocks.end <= length && blocks.end - blocks.start <= LARGE as u64 {
            return self.merge(offset, data, durability);
        }
        let inner = self.ceil(offset)?.min(end)..self.floor(end).max(offset);
        // Within one block, or in two incomplete ones, there is no inner part.
        let inner = if inner.start < inner.end { inner } else { inner.start..inner.start };
        let (head, rest) = data.split_at((inner.start - offset) as usize);
        let (middle, tail) = rest.split_at((inner.end - inner.start) as usize);
        self.write_edge(file, length, offset, head)?;
        self.write_blocks(file, inner.start, middle, Durability::Cached)?;
        self.write_edge(file, length, inner.end, tail)?;
        match durability {
            Durability::Cached => Ok(()),
            Durability::Fua => durable::sync(file),
        }
    }

    fn block(&self) -> u64 {
        u64::from(self.alignment.offset)
    }

    fn floor(&self, offset: u64) -> u64 {
        offset / self.block() * self.block()
    }

    fn ceil(&self, offset: u64) -> io::Result<u64> {
        let end = offset.checked_next_multiple_of(self.block());
        end.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Whether memory is aligned.
    fn suits(&self, memory: &[u8]) -> bool {
        memory.as_ptr().addr().is_multiple_of(self.alignment.memory as usize)
    }

    /// One read of complete blocks into aligned memory; 0 at the end of the file.
    fn read_some(&self, offset: u64, blocks: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read_at(blocks, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Reads a part of `buffer` through an aligned buffer; 0 at the end of the file.
    fn read_bounced(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let start = self.floor(offset);
        let skipped = (offset - start) as usize;
        let wanted = buffer.len().min(LARGE - skipped);
        let blocks = (skipped + wanted).next_multiple_of(self.block() as usize);
        let mut bounce = self.pool.take(blocks);
        let read = self.read_some(start, bounce.bytes_mut())?;
        let found = bounce.bytes().get(skipped..read.max(skipped)).unwrap_or_default();
        let length = found.len().min(wanted);
        buffer[..length].copy_from_slice(&found[..length]);
        Ok(length)
    }

    /// Writes complete blocks from memory of any alignment.
    fn write_blocks(
        &self,
        file: &File,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> io::Result<()> {
        if self.suits(data) {
            return self.write_aligned(offset, data, durability);
        }
        if data.len() <= LARGE {
            return self.write_bounced(offset, data, durability);
        }
        for (index, part) in data.chunks(LARGE).enumerate() {
            let place = offset + (index * LARGE) as u64;
            self.write_bounced(place, part, Durability::Cached)?;
        }
        match durability {
            Durability::Cached => Ok(()),
            Durability::Fua => durable::sync(file),
        }
    }

    fn write_bounced(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        let mut bounce = self.pool.take(data.len());
        bounce.bytes_mut().copy_from_slice(data);
        self.write_aligned(offset, bounce.bytes(), durability)
    }

    /// Writes complete blocks from aligned memory.
    fn write_aligned(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        durable::write_all(&self.file, offset, data, self.block() as usize, durability)
    }

    /// Writes to blocks within the file, the first and the last of which are written in part.
    fn merge(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        let (start, end) = (self.floor(offset), offset + data.len() as u64);
        let block = self.block() as usize;
        let last = self.floor(end - 1);
        let mut bounce = self.pool.take((last - start) as usize + block);
        let bytes = bounce.bytes_mut();
        if offset != start {
            self.read_block(start, &mut bytes[..block])?;
        }
        if end != last + self.block() && (last != start || offset == start) {
            self.read_block(last, &mut bytes[(last - start) as usize..])?;
        }
        bytes[(offset - start) as usize..][..data.len()].copy_from_slice(data);
        self.write_aligned(start, bounce.bytes(), durability)
    }

    fn read_block(&self, offset: u64, block: &mut [u8]) -> io::Result<()> {
        // Another process has truncated the file.
        let is_whole = self.read_some(offset, block)? == block.len();
        if is_whole { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Writes a part of one block, in which or before which the file may end.
    fn write_edge(&self, file: &File, length: u64, offset: u64, data: &[u8]) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        if self.ceil(offset + data.len() as u64)? <= length {
            return self.merge(offset, data, Durability::Cached);
        }
        file.write_all_at(data, offset)
    }
}

fn no_direct_io(path: &Path) -> Error {
    let detail = "its file system has no direct I/O; open it with the cache mode 'writeback' or \
                  'writethrough', which use the page cache";
    Error::new(ErrorKind::Unsupported, "open", detail).with_path(path)
}
