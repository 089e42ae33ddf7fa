//! An open backup as a storage.

use std::io;
use std::ops::Range;
use std::sync::{Arc, mpsc};

use bytes::Bytes;
use imgfmt::storage::{StorageExtent, TryRead};
use imgfmt::{ExtentKind, HostOffset, Storage};

use super::super::error::Result;
use super::super::page::{BLOCK_SIZE, PAGE_BLOCKS, PAGE_SPAN};
use super::{OpenBackup, STEP};
use crate::runtime::boxed;

impl OpenBackup {
    /// The blocks of the backup for a range of the disk, and its length within the disk.
    fn blocks_of(&self, offset: u64, length: usize) -> (Range<u64>, usize) {
        let available = self.size().saturating_sub(offset);
        let length = usize::try_from(available).unwrap_or(usize::MAX).min(length);
        let offset = self.window.start.saturating_add(offset);
        let end = offset.saturating_add(length as u64);
        (offset / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE), length)
    }

    /// Returns the kind of the bytes at an offset of the backup, and an offset up to which it is
    /// the same. Reads one page of the map at most: `None` if it would need another one.
    fn kind_at(&self, offset: u64, may_wait: &mut bool) -> Option<(ExtentKind, u64)> {
        let map = &self.disk.map;
        let page_end = (offset / PAGE_SPAN + 1) * PAGE_SPAN;
        let number = (offset / PAGE_SPAN) as usize;
        if map.is_zero(number) {
            return Some((ExtentKind::Hole, page_end));
        }
        let page = match map.kept(number) {
            Some(page) => page,
            None if !std::mem::take(may_wait) => return None,
            None => {
                let disk = Arc::clone(&self.disk);
                match wait(async move { disk.map.page(number).await }) {
                    Ok(page) => page,
                    // A page that cannot be read has no holes.
                    Err(_) => return Some((ExtentKind::Data, page_end)),
                }
            }
        };
        let block = offset / BLOCK_SIZE;
        let mut rest = page.blocks.iter().skip((block % PAGE_BLOCKS) as usize).map(Option::is_some);
        let is_data = rest.next().unwrap_or(true);
        let same = rest.take_while(|other| *other == is_data).count() as u64;
        let kind = if is_data { ExtentKind::Data } else { ExtentKind::Hole };
        Some((kind, (block + 1 + same) * BLOCK_SIZE))
    }

    /// Copies a range out of its blocks.
    fn copy(offset: u64, blocks: &[Option<Bytes>], buffer: &mut [u8]) {
        let mut skip = (offset % BLOCK_SIZE) as usize;
        let mut rest = buffer;
        for block in blocks {
            let length = (BLOCK_SIZE as usize - skip).min(rest.len());
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(length);
            match block.as_ref().and_then(|block| block.get(skip..skip + length)) {
                Some(bytes) => part.copy_from_slice(bytes),
                None => part.fill(0),
            }
            rest = behind;
            skip = 0;
        }
    }
}

impl Storage for OpenBackup {
    fn len(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let (blocks, length) = self.blocks_of(offset.bytes(), buffer.len());
        if length == 0 {
            return Ok(0);
        }
        let disk = Arc::clone(&self.disk);
        let found = wait(async move { disk.blocks(blocks).await })?;
        Self::copy(offset.bytes(), &found, &mut buffer[..length]);
        Ok(length)
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        let (blocks, length) = self.blocks_of(offset.bytes(), buffer.len());
        if length < buffer.len() {
            return Ok(TryRead::WouldBlock);
        }
        let Some(found) = self.disk.kept(blocks) else { return Ok(TryRead::WouldBlock) };
        Self::copy(offset.bytes(), &found, buffer);
        Ok(TryRead::Complete)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        let offset = self.window.start.saturating_add(offset.bytes());
        let end = offset.saturating_add(length).min(self.window.end);
        let (mut at, mut kind, mut may_wait) = (offset, None, true);
        while at < end {
            let Some((own, own_end)) = self.kind_at(at, &mut may_wait) else { break };
            if *kind.get_or_insert(own) != own {
                break;
            }
            at = own_end;
        }
        let length = at.min(end).saturating_sub(offset);
        match kind {
            Some(kind) => Ok(StorageExtent { length, kind }),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        let offset = self.window.start.saturating_add(offset.bytes());
        let end = offset.saturating_add(length);
        let blocks = offset / BLOCK_SIZE..end.div_ceil(BLOCK_SIZE);
        if blocks.end - blocks.start > STEP {
            return false;
        }
        let kept = self.disk.cache().kept(blocks);
        kept.is_some_and(|blocks| blocks.iter().all(Option::is_some))
    }
}

/// Runs a future on the runtime of requests and waits for it.
fn wait<T: Send + 'static>(
    future: impl Future<Output = Result<T>> + Send + 'static,
) -> io::Result<T> {
    let (sender, receiver) = mpsc::channel();
    crate::runtime()?.spawn(boxed(async move {
        let _ = sender.send(future.await);
    }));
    match receiver.recv() {
        Ok(result) => result.map_err(io::Error::other),
        Err(_) => Err(io::Error::other("a request was given up")),
    }
}
