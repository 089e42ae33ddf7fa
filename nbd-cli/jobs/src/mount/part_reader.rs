//! Reads a part of a disk for a parser of file systems: in blocks that are kept, and only so much
//! for each request.

use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::disk::MountedDisk;

const BLOCK_LEN: u64 = 16 << 10;
/// Blocks that are kept: 8 MiB.
const MAX_BLOCKS: usize = 512;
/// Reads for one request. To list the largest directory of FAT takes 2^20, and to reach the end of
/// a file of 4 GiB with the usual clusters 2^21, each of nanoseconds. Tests of damage need less.
const MAX_READS: u64 = if cfg!(test) { 1 << 15 } else { 1 << 22 };

/// The reads that a request may still make.
#[derive(Clone, Debug)]
pub(super) struct Budget(Arc<AtomicU64>);

impl Budget {
    /// Begins a request.
    pub(super) fn renew(&self) {
        self.0.store(MAX_READS, Ordering::Relaxed);
    }

    fn take(&self) -> io::Result<()> {
        let left = self.0.load(Ordering::Relaxed);
        let left = left.checked_sub(1).ok_or_else(|| {
            io::Error::other("the file system leads in circles, or a directory is too large")
        })?;
        self.0.store(left, Ordering::Relaxed);
        Ok(())
    }
}

/// A part of a disk, as a file of its own.
pub(super) struct PartReader {
    disk: Arc<MountedDisk>,
    range: Range<u64>,
    position: u64,
    blocks: HashMap<u64, Box<[u8]>>,
    budget: Budget,
}

impl PartReader {
    pub(super) fn new(disk: Arc<MountedDisk>, range: Range<u64>) -> Self {
        let budget = Budget(Arc::new(AtomicU64::new(MAX_READS)));
        Self { disk, range, position: 0, blocks: HashMap::new(), budget }
    }

    pub(super) fn budget(&self) -> Budget {
        self.budget.clone()
    }

    fn len(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    /// Fills the buffer from `offset` on.
    pub(super) fn fill(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let at = offset.checked_add(filled as u64).ok_or(io::ErrorKind::InvalidInput)?;
            match self.some(at, rest)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => filled += count,
            }
        }
        Ok(())
    }

    /// Reads up to the end of a block.
    fn some(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.budget.take()?;
        if offset >= self.len() || buffer.is_empty() {
            return Ok(0);
        }
        let (number, inside) = (offset / BLOCK_LEN, offset % BLOCK_LEN);
        if !self.blocks.contains_key(&number) {
            let start = number * BLOCK_LEN;
            let length = BLOCK_LEN.min(self.len() - start);
            // At most BLOCK_LEN.
            let mut block = vec![0; length as usize].into_boxed_slice();
            let at = self.range.start + start;
            self.disk
                .read(at, &mut block)
                .map_err(|error| io::Error::from_raw_os_error(error.into()))?;
            if self.blocks.len() >= MAX_BLOCKS {
                self.blocks.clear();
            }
            self.blocks.insert(number, block);
        }
        // Less than BLOCK_LEN.
        let block = self.blocks.get(&number).and_then(|block| block.get(inside as usize..));
        let block = block.unwrap_or_default();
        let count = block.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), block.get(..count)) {
            to.copy_from_slice(from);
        }
        Ok(count)
    }
}

impl Read for PartReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.some(self.position, buffer)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for PartReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.budget.take()?;
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.len().checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// The parser wants it; nothing is ever written.
impl Write for PartReader {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
