//! Reads blocks from packs: many by one request.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;

use super::super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::super::id::{Key, PackId};
use super::super::map::missing;
use super::super::objects::shorter;
use super::super::page::{BLOCK_SIZE, PAGE_BLOCKS};
use super::super::seal::Sealer;
use super::super::stored::Stored;
use super::ahead::WINDOW_MAX;
use super::cache::Fetch;
use super::{Damage, Disk};
use crate::runtime::boxed;

/// Most bytes of a request.
const REQUEST_MAX: u64 = 12 << 20;
/// Bytes that are read and not used, rather than make another request.
const GAP_MAX: u64 = 64 << 10;
/// Requests of one fetch at a time.
const REQUESTS: usize = 8;
/// Blocks that are opened in one go: those who wait for them need not wait for a whole pack.
const OPENED: usize = 32;
/// Most blocks of a part that is read ahead, without holes.
const PART_MAX: u64 = 320;

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
            let mut cache = self.disk.cache();
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
            self.cache().cut(&later);
        }
        self.fetch_all(&mut ending).await;
    }

    async fn fetch_all(&self, ending: &mut Ending<'_>) {
        let mut result = Ok(());
        let groups = self.groups(&ending.blocks, &mut result).await;
        let fetch = ending.fetch;
        let requests = groups.into_iter().map(|group| self.read_group(group, fetch));
        let mut requests = futures_util::stream::iter(requests).buffer_unordered(REQUESTS);
        while let Some(read) = requests.next().await {
            result = result.and(read);
        }
        ending.result = result;
    }

    /// Begins to read ahead of a reader, as long as there is room.
    pub(super) async fn read_ahead(self: Arc<Self>) {
        let mut from = self.cache().ahead.plan();
        while let Some(start) = from {
            let Some((part, blocks)) = self.part_from(start).await else {
                // The read that needs the page gets the error.
                return self.cache().ahead.stop();
            };
            let fetch = Fetch::new();
            let mut cache = self.cache();
            if cache.ahead.begins(&part, blocks.len() as u64) && !blocks.is_empty() {
                let blocks = cache.mark(blocks, &fetch);
                let disk = Arc::clone(&self);
                tokio::spawn(boxed(async move { disk.fetch_part(blocks, &fetch).await }));
            }
            from = cache.ahead.plan();
        }
    }

    async fn fetch_part(self: Arc<Self>, blocks: Vec<u64>, fetch: &Fetch) {
        let mut ending = Ending { disk: &self, blocks, fetch, result: given_up() };
        self.fetch_all(&mut ending).await;
        drop(ending);
        if self.cache().ahead.arrived() {
            self.go_on().await;
        }
    }

    /// Boxed, because one begins the other.
    fn go_on(self: &Arc<Self>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(Arc::clone(self).read_ahead())
    }

    /// Finds the blocks of the next part, from `start` on, and where it ends: it ends with a pack.
    async fn part_from(&self, start: u64) -> Option<(Range<u64>, Vec<u64>)> {
        let count = self.count;
        let (mut at, mut blocks, mut pack) = (start, Vec::new(), None);
        while at < count && (blocks.len() as u64) < PART_MAX {
            let (number, index) = (at / PAGE_BLOCKS, at % PAGE_BLOCKS);
            if self.map.is_zero(number as usize) {
                at = (number + 1) * PAGE_BLOCKS;
                continue;
            }
            let page = self.map.page(number as usize).await.ok()?;
            if let Some(stored) = page.blocks.get(index as usize).copied().flatten() {
                let is_other = pack.replace(stored.pack).is_some_and(|pack| pack != stored.pack);
                if is_other && blocks.len() as u64 > WINDOW_MAX / 2 {
                    break;
                }
                blocks.push(at);
            }
            at += 1;
        }
        Some((start..at.min(count), blocks))
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

    /// Reads a group into the cache, as it arrives.
    async fn read_group(&self, group: Group, fetch: &Fetch) -> Result<()> {
        let (mut rest, mut result) = (&group.blocks[..], Ok(()));
        if let Err(error) = self.receive(&group, &mut rest, &mut result, fetch).await {
            for (block, _) in rest {
                self.settle(*block, Err(error.clone()), &mut result);
            }
        }
        result
    }

    /// Takes from the front of `rest` what has been settled.
    async fn receive(
        &self,
        group: &Group,
        rest: &mut &[(u64, Stored)],
        result: &mut Result<()>,
        fetch: &Fetch,
    ) -> Result<()> {
        let key = Key::Pack(group.pack);
        let _turn = self.requests.acquire().await;
        let stream = self.objects.stream_range(key, group.start..group.end).await?;
        let mut stream = stream.ok_or_else(|| missing(group.pack))?;
        let (mut bytes, mut start) = (BytesMut::new(), group.start);
        while !rest.is_empty() {
            let (count, end) = next_piece(rest);
            let length = (end - start) as usize;
            while bytes.len() < length {
                let piece = stream.next().await.unwrap_or_else(|| Err(shorter(key)))?;
                bytes.extend_from_slice(&piece);
            }
            let (blocks, later) = rest.split_at(count);
            let opened = self.open_frames(blocks, bytes.split_to(length).freeze(), start).await;
            for (block, opened) in opened {
                self.settle(block, opened.map(Some), result);
            }
            (*rest, start) = (later, end);
            fetch.moved();
        }
        Ok(())
    }

    /// Opens blocks in bytes of a pack from `start` on.
    async fn open_frames(
        &self,
        blocks: &[(u64, Stored)],
        bytes: Bytes,
        start: u64,
    ) -> Vec<(u64, Result<Bytes>)> {
        let sealer = self.objects.sealer.clone();
        let disk = self.start;
        let frames: Vec<_> = blocks
            .iter()
            .map(|(block, stored)| (*block, *stored, self.map.block_length(*block)))
            .collect();
        let open = move || {
            let opened = frames.into_iter().map(|(block, stored, length)| {
                let range = stored.range();
                let frame = bytes.get((range.start - start) as usize..(range.end - start) as usize);
                let offset = (block * BLOCK_SIZE).saturating_sub(disk);
                (block, open(&sealer, offset, &stored, frame.unwrap_or_default(), length))
            });
            opened.collect()
        };
        tokio::task::spawn_blocking(open).await.unwrap_or_else(|error| {
            let error = RepositoryError::invalid(format!("a block could not be opened: {error}"));
            blocks.iter().map(|(block, _)| (*block, Err(error.clone()))).collect()
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
        self.cache().keep(block, bytes);
    }
}

/// Returns how many of the blocks, which are sorted by their places, are opened next, and where
/// they end: behind it no other begins before.
fn next_piece(blocks: &[(u64, Stored)]) -> (usize, u64) {
    let mut end = 0;
    for (count, (_, stored)) in blocks.iter().enumerate() {
        let range = stored.range();
        if count >= OPENED && range.start >= end {
            return (count, end);
        }
        end = end.max(range.end);
    }
    (blocks.len(), end)
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
