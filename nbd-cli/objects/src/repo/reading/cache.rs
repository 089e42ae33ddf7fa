//! Blocks in memory, and those that are being read.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use super::super::error::Result;

/// Blocks that are kept: 64 MiB.
const KEPT: usize = 1024;
/// Most blocks that are read at a time: more than a pack has of data that does not compress.
pub(super) const WINDOW_MAX: u64 = 192;

/// Several blocks that are being read.
#[derive(Debug)]
pub(super) struct Fetch {
    ended: watch::Sender<Option<Result<()>>>,
}

impl Fetch {
    fn new() -> Arc<Self> {
        Arc::new(Self { ended: watch::Sender::new(None) })
    }

    pub(super) fn end(&self, result: Result<()>) {
        self.ended.send_replace(Some(result));
    }

    /// Waits for the end.
    pub(super) async fn ended(&self) -> Result<()> {
        let mut receiver = self.ended.subscribe();
        match receiver.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(Ok(())),
            Err(_) => Ok(()),
        }
    }
}

#[derive(Debug)]
enum Slot {
    /// Zeroes are `None`.
    Kept(Option<Bytes>, u64),
    Fetching(Arc<Fetch>),
}

/// What the cache has of a range.
pub(super) enum Found {
    All(Vec<Option<Bytes>>),
    /// Others are reading a part of it.
    Fetching(Arc<Fetch>),
    /// These have to be read by the caller; they are marked.
    Missing(Vec<u64>, Arc<Fetch>),
}

#[derive(Debug, Default)]
pub(super) struct Cache {
    slots: HashMap<u64, Slot>,
    kept: usize,
    uses: u64,
    /// The end of the last window, and its length.
    next: u64,
    window: u64,
}

impl Cache {
    /// Returns the blocks if all are there.
    pub(super) fn kept(&mut self, blocks: Range<u64>) -> Option<Vec<Option<Bytes>>> {
        self.uses += 1;
        let uses = self.uses;
        blocks
            .map(|block| match self.slots.get_mut(&block) {
                Some(Slot::Kept(bytes, used)) => {
                    *used = uses;
                    Some(bytes.clone())
                }
                _ => None,
            })
            .collect()
    }

    /// Finds the blocks of a disk of `count` blocks, or says what to do.
    pub(super) fn find(&mut self, blocks: Range<u64>, count: u64) -> Found {
        if let Some(found) = self.kept(blocks.clone()) {
            return Found::All(found);
        }
        let is_missing = |block: &u64| !self.slots.contains_key(block);
        let Some(first) = blocks.clone().find(is_missing) else {
            let fetch = blocks.clone().find_map(|block| match self.slots.get(&block) {
                Some(Slot::Fetching(fetch)) => Some(Arc::clone(fetch)),
                _ => None,
            });
            return fetch.map_or(Found::All(Vec::new()), Found::Fetching);
        };
        // Reads that go on where others ended get more than they ask for. Several at a time arrive
        // in any order: what is between them is read as well.
        let is_next = first > 0
            && (first == self.next
                || (self.window > 0 && (self.next..self.next + WINDOW_MAX).contains(&first)));
        let start = if is_next { self.next.min(first) } else { first };
        self.window = if is_next { (self.window * 2).clamp(8, WINDOW_MAX) } else { 0 };
        let end = blocks.end.max(start.saturating_add(self.window)).min(count.max(blocks.end));
        let missing: Vec<_> =
            (start..end).filter(|block| !self.slots.contains_key(block)).collect();
        let fetch = Fetch::new();
        for &block in &missing {
            self.slots.insert(block, Slot::Fetching(Arc::clone(&fetch)));
        }
        self.next = end;
        Found::Missing(missing, fetch)
    }

    /// Keeps a block that was read.
    pub(super) fn keep(&mut self, block: u64, bytes: Option<Bytes>) {
        self.uses += 1;
        if !matches!(self.slots.insert(block, Slot::Kept(bytes, self.uses)), Some(Slot::Kept(..))) {
            self.kept += 1;
        }
        if self.kept > KEPT {
            self.evict();
        }
    }

    /// Says that blocks from here on will not be read ahead, but at once when they are asked for.
    pub(super) fn cut(&mut self, blocks: &[u64]) {
        blocks.iter().for_each(|&block| self.fail(block));
        if let (Some(&first), Some(&last)) = (blocks.first(), blocks.last())
            && self.next == last + 1
        {
            self.next = first;
        }
    }

    /// Forgets that a block is being read.
    pub(super) fn fail(&mut self, block: u64) {
        if matches!(self.slots.get(&block), Some(Slot::Fetching(_))) {
            self.slots.remove(&block);
        }
    }

    /// Removes the quarter that was not used for longest.
    fn evict(&mut self) {
        let used = |slot: &Slot| match slot {
            Slot::Kept(_, used) => Some(*used),
            Slot::Fetching(_) => None,
        };
        let mut uses: Vec<_> = self.slots.values().filter_map(used).collect();
        uses.sort_unstable();
        let limit = uses.get(KEPT / 4).copied().unwrap_or_default();
        self.slots.retain(|_, slot| used(slot).is_none_or(|used| used > limit));
        self.kept = self.slots.values().filter(|slot| matches!(slot, Slot::Kept(..))).count();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(found: Found) -> (Vec<u64>, Arc<Fetch>) {
        match found {
            Found::Missing(missing, fetch) => (missing, fetch),
            _ => panic!("something is there"),
        }
    }

    #[test]
    fn sequential_reads_are_read_ahead_and_random_ones_are_not() {
        let mut cache = Cache::default();
        let mut at = 500;
        assert_eq!(missing(cache.find(500..501, 10_000)).0, [500]);
        for expected in [8, 16, 32, 64, 128, 192, 192] {
            at = (at..).find(|block| !cache.slots.contains_key(block)).unwrap();
            let (read, _) = missing(cache.find(at..at + 1, 10_000));
            assert_eq!(read.len(), expected);
        }
        assert_eq!(missing(cache.find(9000..9002, 10_000)).0, [9000, 9001]);
        // The disk ends.
        assert_eq!(missing(cache.find(9002..9003, 9005)).0, [9002, 9003, 9004]);
    }

    #[test]
    fn sequential_reads_in_any_order_are_read_ahead_without_gaps() {
        let mut cache = Cache::default();
        missing(cache.find(500..504, 10_000));
        assert_eq!(missing(cache.find(504..508, 10_000)).0, (504..512).collect::<Vec<_>>());
        assert_eq!(missing(cache.find(516..520, 10_000)).0, (512..528).collect::<Vec<_>>());
        assert!(matches!(cache.find(512..516, 10_000), Found::Fetching(_)));
        // What is cut off is read next.
        cache.cut(&[526, 527]);
        assert_eq!(missing(cache.find(526..528, 10_000)).0, (526..558).collect::<Vec<_>>());
        assert_eq!(missing(cache.find(558 + 192..558 + 193, 10_000)).0, [558 + 192]);
    }

    #[test]
    fn blocks_are_read_once_and_kept_within_bounds() {
        let mut cache = Cache::default();
        let (read, fetch) = missing(cache.find(10..12, 99_999));
        assert!(matches!(cache.find(11..12, 99_999), Found::Fetching(_)));
        cache.keep(read[0], None);
        cache.fail(read[1]);
        fetch.end(Ok(()));
        assert!(cache.kept(10..11).is_some());
        assert_eq!(missing(cache.find(11..12, 99_999)).0[0], 11);
        for block in 20_000..30_000 {
            cache.keep(block, Some(Bytes::new()));
            assert!(cache.kept <= KEPT && cache.slots.len() <= KEPT + WINDOW_MAX as usize);
        }
        assert!(cache.kept(29_990..30_000).is_some() && cache.kept(20_000..20_001).is_none());
    }
}
