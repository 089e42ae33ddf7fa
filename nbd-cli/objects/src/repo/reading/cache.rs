//! Blocks in memory, and those that are being read.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use super::super::error::Result;
use super::ahead::Ahead;

/// Blocks of data that are kept, together with those that are being read: 96 MiB. More than what is
/// read ahead.
const BLOCKS: usize = 1536;
/// Blocks of data that are kept in any case: what has arrived must stay until it is taken.
const KEPT_MIN: usize = BLOCKS / 2;
/// Entries for blocks that are kept: those that read as zero take little memory.
const SLOTS: usize = 1 << 16;

/// Several blocks that are being read.
#[derive(Debug)]
pub(super) struct Fetch {
    ended: watch::Sender<Option<Result<()>>>,
}

impl Fetch {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { ended: watch::Sender::new(None) })
    }

    /// Says that some of the blocks have arrived.
    pub(super) fn moved(&self) {
        self.ended.send_modify(|_| {});
    }

    pub(super) fn end(&self, result: Result<()>) {
        self.ended.send_replace(Some(result));
    }

    fn arrival(&self) -> Arrival {
        Arrival(self.ended.subscribe())
    }
}

/// What comes next of a fetch.
pub(super) struct Arrival(watch::Receiver<Option<Result<()>>>);

impl Arrival {
    /// Waits until more blocks have arrived, or for the end, which may be an error.
    pub(super) async fn wait(mut self) -> Result<()> {
        if self.0.borrow().is_none() {
            // An error is an end, too.
            let _ = self.0.changed().await;
        }
        self.0.borrow().clone().unwrap_or(Ok(()))
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
    Fetching(Arrival),
    /// These have to be read by the caller; they are marked.
    Missing(Vec<u64>, Arc<Fetch>, Arrival),
}

#[derive(Debug, Default)]
pub(super) struct Cache {
    slots: HashMap<u64, Slot>,
    /// Those that are kept, without zeroes.
    kept: usize,
    fetching: usize,
    uses: u64,
    pub(super) ahead: Ahead,
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
                Some(Slot::Fetching(fetch)) => Some(fetch.arrival()),
                _ => None,
            });
            return fetch.map_or(Found::All(Vec::new()), Found::Fetching);
        };
        let wanted = self.ahead.misses(&blocks, first, count);
        let fetch = Fetch::new();
        let missing = self.mark(wanted, &fetch);
        let arrival = fetch.arrival();
        Found::Missing(missing, fetch, arrival)
    }

    /// Marks those blocks that are not there; returns them.
    pub(super) fn mark(
        &mut self,
        blocks: impl IntoIterator<Item = u64>,
        fetch: &Arc<Fetch>,
    ) -> Vec<u64> {
        let missing: Vec<_> =
            blocks.into_iter().filter(|block| !self.slots.contains_key(block)).collect();
        for &block in &missing {
            self.put(block, Slot::Fetching(Arc::clone(fetch)));
        }
        missing
    }

    fn put(&mut self, block: u64, slot: Slot) {
        self.count(&slot, 1);
        if let Some(before) = self.slots.insert(block, slot) {
            self.count(&before, -1);
        }
        let has_many = self.kept + self.fetching > BLOCKS && self.kept > KEPT_MIN;
        if has_many || self.is_full() {
            self.evict();
        }
    }

    fn is_full(&self) -> bool {
        self.slots.len() - self.fetching > SLOTS
    }

    fn count(&mut self, slot: &Slot, by: isize) {
        let count = match slot {
            Slot::Kept(None, _) => return,
            Slot::Kept(..) => &mut self.kept,
            Slot::Fetching(_) => &mut self.fetching,
        };
        *count = count.saturating_add_signed(by);
    }

    /// Keeps a block that was read.
    pub(super) fn keep(&mut self, block: u64, bytes: Option<Bytes>) {
        self.uses += 1;
        self.put(block, Slot::Kept(bytes, self.uses));
    }

    /// Says that blocks from here on will not be read ahead, but at once when they are asked for.
    pub(super) fn cut(&mut self, blocks: &[u64]) {
        blocks.iter().for_each(|&block| self.fail(block));
        if let (Some(&first), Some(&last)) = (blocks.first(), blocks.last()) {
            self.ahead.cut(first, last + 1);
        }
    }

    /// Forgets that a block is being read.
    pub(super) fn fail(&mut self, block: u64) {
        if matches!(self.slots.get(&block), Some(Slot::Fetching(_))) {
            self.slots.remove(&block);
            self.fetching -= 1;
        }
    }

    /// Removes a part of what is kept: what was not used for longest, and what was read ahead and
    /// is still to be asked for as the last.
    fn evict(&mut self) {
        let (is_full, ahead) = (self.is_full(), self.ahead.wanted());
        let rank = |block: &u64, slot: &Slot| match slot {
            Slot::Kept(bytes, used) if is_full || bytes.is_some() => {
                Some((ahead.contains(block), *used))
            }
            _ => None,
        };
        let mut ranks: Vec<_> = self.slots.iter().filter_map(|(it, slot)| rank(it, slot)).collect();
        ranks.sort_unstable();
        let count = if is_full { SLOTS / 4 } else { BLOCKS / 8 };
        let Some(limit) = ranks.get(count).or(ranks.last()).copied() else { return };
        self.slots.retain(|block, slot| rank(block, slot).is_none_or(|rank| rank > limit));
        let is_data = |slot: &&Slot| matches!(slot, Slot::Kept(Some(_), _));
        self.kept = self.slots.values().filter(is_data).count();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(found: Found) -> (Vec<u64>, Arc<Fetch>) {
        match found {
            Found::Missing(missing, fetch, _) => (missing, fetch),
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
            assert!(cache.kept <= BLOCKS && cache.slots.len() <= BLOCKS + 2);
        }
        assert!(cache.kept(29_990..30_000).is_some() && cache.kept(20_000..20_001).is_none());
        // However many are being read, what has arrived can be taken.
        let fetch = Fetch::new();
        cache.mark(100_000..110_000, &fetch);
        for block in 100_000..110_000 {
            cache.keep(block, Some(Bytes::new()));
            assert!(cache.kept(block..block + 1).is_some() && cache.kept <= BLOCKS);
        }
        for block in 0..150_000 {
            cache.keep(block, None);
            assert!(cache.slots.len() <= SLOTS + 1);
        }
    }
}
