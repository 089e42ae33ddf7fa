//! Reads blocks from packs: many by one request.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use futures_util::StreamExt as _;

use super::super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::super::id::{Key, PackId};
use super::super::map::missing;
use super::super::page::{BLOCK_SIZE, PAGE_BLOCKS};
use super::super::seal::Sealer;
use super::super::stored::Stored;
use super::cache::{Fetch, WINDOW_MAX};
use super::{Damage, Disk};

/// Most bytes of a request.
const REQUEST_MAX: u64 = 12 << 20;
/// Bytes that are read and not used, rather than make another request.
const GAP_MAX: u64 = 64 << 10;
/// Requests of one fetch at a time.
const REQUESTS: usize = 8;

/// Blocks that one request reads.
struct Group {
    pack: PackId,
    start: u64,
    end: u64,
    blocks: Vec<(u64, Stored)>,
}

/// Ends a fetch when it is dropped, even by a panic: others wait for it.
struct Ending<'a> {
    disk: &'a Disk,
    blocks: Vec<u64>,
    fetch: &'a Fetch,
    result: Result<()>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        {
            let mut cache = self.disk.cache.lock().unwrap_or_else(PoisonError::into_inner);
            self.blocks.iter().for_each(|&block| cache.fail(block));
        }
        self.fetch.end(std::mem::replace(&mut self.result, Ok(())));
    }
}

fn given_up() -> Result<()> {
    let message = "a read of the repository was given up";
    Err(RepositoryError::new(RepositoryErrorKind::Store, message))
}

impl Disk {
    /// Reads blocks into the cache, and ends the fetch. Blocks from `wanted` on are read ahead.
    pub(super) async fn fetch(self: Arc<Self>, blocks: Vec<u64>, wanted: u64, fetch: &Fetch) {
        let mut ending = Ending { disk: &self, blocks, fetch, result: given_up() };
        if let Some(cut) = self.pack_begins(&ending.blocks, wanted).await {
            let later = ending.blocks.split_off(cut);
            self.cache.lock().unwrap_or_else(PoisonError::into_inner).cut(&later);
        }
        let mut result = Ok(());
        let groups = self.groups(&ending.blocks, &mut result).await;
        let requests = groups.into_iter().map(|group| self.read_group(group));
        let mut requests = futures_util::stream::iter(requests).buffer_unordered(REQUESTS);
        while let Some(read) = requests.next().await {
            for (block, bytes) in read {
                self.settle(block, bytes.map(Some), &mut result);
            }
        }
        ending.result = result;
    }

    /// Finds where, among blocks that are read ahead, the pack begins that goes on behind them. One
    /// request reads it later.
    async fn pack_begins(&self, blocks: &[u64], wanted: u64) -> Option<usize> {
        let last = *blocks.last().filter(|_| blocks.len() as u64 > WINDOW_MAX / 2)?;
        let pack = self.stored(last + 1).await?.pack;
        let mut begin = blocks.len();
        while begin > 0 && blocks[begin - 1] >= wanted {
            match self.stored(blocks[begin - 1]).await {
                Some(stored) if stored.pack == pack => begin -= 1,
                _ => return Some(begin).filter(|&begin| begin < blocks.len()),
            }
        }
        None
    }

    /// Where a block is; `None` for zeroes, and if that is not known.
    async fn stored(&self, block: u64) -> Option<Stored> {
        if block >= self.map.size().div_ceil(BLOCK_SIZE) {
            return None;
        }
        let page = self.map.page((block / PAGE_BLOCKS) as usize).await.ok()?;
        *page.blocks.get((block % PAGE_BLOCKS) as usize)?
    }

    /// Finds where blocks are, and sorts them by requests.
    async fn groups(&self, blocks: &[u64], result: &mut Result<()>) -> Vec<Group> {
        let mut stored = Vec::new();
        for &block in blocks {
            match self.map.page((block / PAGE_BLOCKS) as usize).await {
                Ok(page) => match page.blocks.get((block % PAGE_BLOCKS) as usize) {
                    Some(Some(found)) => stored.push((block, *found)),
                    _ => self.settle(block, Ok(None), result),
                },
                Err(error) => self.settle(block, Err(error), result),
            }
        }
        stored.sort_unstable_by_key(|(_, stored)| (stored.pack, stored.offset));
        let mut groups: Vec<Group> = Vec::new();
        for (block, stored) in stored {
            let range = stored.range();
            if let Some(group) = groups.last_mut()
                && group.pack == stored.pack
                && range.start <= group.end.saturating_add(GAP_MAX)
                && range.end.saturating_sub(group.start) <= REQUEST_MAX
            {
                group.end = group.end.max(range.end);
                group.blocks.push((block, stored));
                continue;
            }
            let (pack, start, end) = (stored.pack, range.start, range.end);
            groups.push(Group { pack, start, end, blocks: vec![(block, stored)] });
        }
        groups
    }

    async fn read_group(&self, group: Group) -> Vec<(u64, Result<Bytes>)> {
        let Group { pack, start, end, blocks } = group;
        let read = self.objects.read_range(Key::Pack(pack), start..end).await;
        let bytes = match read.and_then(|bytes| bytes.ok_or_else(|| missing(pack))) {
            Ok(bytes) => bytes,
            Err(error) => {
                return blocks.iter().map(|(block, _)| (*block, Err(error.clone()))).collect();
            }
        };
        let sealer = self.objects.sealer.clone();
        let lengths: Vec<_> =
            blocks.iter().map(|(block, _)| self.map.block_length(*block)).collect();
        let numbers: Vec<_> = blocks.iter().map(|(block, _)| *block).collect();
        let disk = self.start;
        let open = move || {
            let opened = blocks.iter().zip(lengths).map(|((block, stored), length)| {
                let range = stored.range();
                let frame = bytes.get((range.start - start) as usize..(range.end - start) as usize);
                let offset = (*block * BLOCK_SIZE).saturating_sub(disk);
                (*block, open(&sealer, offset, stored, frame.unwrap_or_default(), length))
            });
            opened.collect()
        };
        tokio::task::spawn_blocking(open).await.unwrap_or_else(|error| {
            let error = RepositoryError::invalid(format!("a block could not be opened: {error}"));
            numbers.into_iter().map(|block| (block, Err(error.clone()))).collect()
        })
    }

    /// Keeps a block, or what is said of its damage.
    fn settle(&self, block: u64, bytes: Result<Option<Bytes>>, result: &mut Result<()>) {
        let bytes = match (bytes, &self.damage) {
            (Ok(bytes), _) => bytes,
            (Err(error), Damage::Told(tell)) if error.kind() == RepositoryErrorKind::Damaged => {
                tell((block * BLOCK_SIZE).saturating_sub(self.start), &error);
                None
            }
            (Err(error), _) => {
                *result = Err(error);
                return;
            }
        };
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).keep(block, bytes);
    }
}

fn open(
    sealer: &Sealer,
    offset: u64,
    stored: &Stored,
    frame: &[u8],
    length: usize,
) -> Result<Bytes> {
    sealer.open(stored.place(), frame, length, stored.hash).map(Bytes::from).map_err(|broken| {
        RepositoryError::damaged(format!(
            "the block at offset {offset} of the disk, in {}, {broken}",
            Key::Pack(stored.pack)
        ))
    })
}
