//! What is read ahead of a reader that goes through a disk in order.
//!
//! Its first reads double a window, whose blocks are fetched together with those that it asked for.
//! When the window has its full length, whole packs are fetched ahead, several at a time: as long
//! as there is room for their blocks, one begins when another one has arrived.

use std::collections::VecDeque;
use std::ops::Range;

/// Most blocks of a window: more than a pack has of data that does not compress.
pub(super) const WINDOW_MAX: u64 = 192;
/// Most parts that are fetched ahead at a time; most are one request.
const PARTS: usize = 8;
/// Blocks that are on their way, or have arrived and were not asked for yet: 56 MiB. Another part
/// begins if there are fewer.
const AHEAD: u64 = 896;
/// Reads of several tasks arrive in any order, so many blocks from each other.
const DISORDER: u64 = 512;

#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// The end of what was asked for.
    at: u64,
    /// The end of what was read ahead.
    next: u64,
    /// The length of the last window.
    window: u64,
    /// The blocks of the disk.
    count: u64,
    /// The ends of the parts that were not asked for completely, and their blocks.
    parts: VecDeque<(u64, u64)>,
    /// Parts that have not arrived.
    fetching: usize,
    is_planning: bool,
}

impl Ahead {
    /// Notes a read of blocks of which `first` is missing, on a disk of `count` blocks; returns
    /// what to read.
    pub(super) fn misses(&mut self, blocks: &Range<u64>, first: u64, count: u64) -> Range<u64> {
        self.count = count;
        if self.is_behind(first) {
            // A hole, or what was kept no longer.
            self.at = self.at.max(blocks.end.min(self.next));
            return first..blocks.end;
        }
        // Reads that go on where others ended get more than they ask for. Several at a time arrive
        // in any order: what is between them is read as well.
        let is_next = first > 0
            && (first == self.next
                || (self.window > 0 && (self.next..self.next + WINDOW_MAX).contains(&first)));
        let start = if is_next { self.next.min(first) } else { first };
        self.window = if is_next { (self.window * 2).clamp(8, WINDOW_MAX) } else { 0 };
        if !is_next {
            self.parts.clear();
        }
        self.at = blocks.end;
        self.next = blocks.end.max(start.saturating_add(self.window)).min(count.max(blocks.end));
        start..self.next
    }

    /// Whether a block is near the reader, and not beyond what was read ahead.
    fn is_behind(&self, block: u64) -> bool {
        self.window > 0 && (self.at.saturating_sub(DISORDER)..self.next).contains(&block)
    }

    /// The blocks that the reader is about to ask for, or has just asked for.
    pub(super) fn wanted(&self) -> Range<u64> {
        let start = if self.window > 0 { self.at.saturating_sub(DISORDER / 2) } else { self.next };
        start..self.next
    }

    /// Says that blocks from `first` on will be read when they are asked for, if they are the end
    /// of what was read ahead.
    pub(super) fn cut(&mut self, first: u64, end: u64) {
        if self.next == end {
            self.next = first;
        }
    }

    /// Notes a read; returns whether the caller has to [plan](Self::plan).
    pub(super) fn passes(&mut self, read: &Range<u64>) -> bool {
        if self.window < WINDOW_MAX || !self.is_behind(read.start) {
            return false;
        }
        self.at = self.at.max(read.end.min(self.next));
        self.is_due()
    }

    /// Notes that a part has arrived; returns whether the caller has to [plan](Self::plan).
    pub(super) fn arrived(&mut self) -> bool {
        self.fetching = self.fetching.saturating_sub(1);
        self.window == WINDOW_MAX && self.is_due()
    }

    fn is_due(&mut self) -> bool {
        let begins = !self.is_planning && self.has_room();
        self.is_planning |= begins;
        begins
    }

    fn has_room(&mut self) -> bool {
        while self.parts.front().is_some_and(|(end, _)| *end <= self.at) {
            self.parts.pop_front();
        }
        let blocks: u64 = self.parts.iter().map(|(_, blocks)| blocks).sum();
        self.fetching < PARTS && blocks < AHEAD && self.next < self.count
    }

    /// Returns where the next part begins; `None` if there is no room for it, or nobody reads: that
    /// ends the plan.
    pub(super) fn plan(&mut self) -> Option<u64> {
        self.is_planning = self.window == WINDOW_MAX && self.has_room();
        self.is_planning.then_some(self.next)
    }

    /// Ends the plan.
    pub(super) fn stop(&mut self) {
        self.is_planning = false;
    }

    /// Notes a part with so many blocks; returns whether its place is still the next one. It then
    /// has to [arrive](Self::arrived), unless it has no blocks.
    pub(super) fn begins(&mut self, part: &Range<u64>, blocks: u64) -> bool {
        if part.start != self.next || self.window < WINDOW_MAX {
            return false;
        }
        self.next = part.end;
        if blocks > 0 {
            self.fetching += 1;
            self.parts.push_back((part.end, blocks));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: u64 = 100_000;

    /// Reads in order until the window has its full length.
    fn warm() -> (Ahead, u64) {
        let mut ahead = Ahead::default();
        let mut at = 100;
        ahead.misses(&(at..at + 1), at, BLOCKS);
        while ahead.window < WINDOW_MAX {
            at = ahead.next;
            ahead.misses(&(at..at + 1), at, BLOCKS);
        }
        (ahead, at + 1)
    }

    #[test]
    fn parts_begin_until_there_is_no_room_and_go_on_when_they_arrive_and_are_read() {
        let (mut ahead, at) = warm();
        assert!(ahead.passes(&(at..at + 1)));
        assert!(!ahead.passes(&(at + 1..at + 2)), "one plan at a time");
        let mut ends = Vec::new();
        while let Some(start) = ahead.plan() {
            // Their blocks are fewer than those of the disk: the others are holes.
            assert!(ahead.begins(&(start..start + 300), 144));
            ends.push(start + 300);
        }
        assert_eq!(ends.len(), 7);
        assert!(!ahead.arrived(), "what has arrived was not read");
        assert!(ahead.passes(&(ends[0] - 1..ends[0])));
        assert_eq!(ahead.plan(), Some(ends[6]));
        assert!(ahead.begins(&(ends[6]..ends[6] + 300), 144));
        assert_eq!(ahead.plan(), None);
        // Short ones.
        assert!(ahead.passes(&(ends[5] - 1..ends[5])));
        let start = ahead.plan().unwrap();
        assert!(ahead.begins(&(start..start + 1), 1));
        assert_eq!(ahead.plan(), None, "as many as may be are fetched");
        assert!(!ahead.passes(&(ends[6] - 1..ends[6])));
        assert!(ahead.arrived(), "there is room");
    }

    #[test]
    fn reads_elsewhere_end_what_is_read_ahead_and_holes_do_not() {
        let (mut ahead, at) = warm();
        let next = ahead.next;
        assert_eq!(ahead.misses(&(at + 5..at + 9), at + 6, BLOCKS), at + 6..at + 9);
        assert_eq!((ahead.next, ahead.window), (next, WINDOW_MAX));
        assert!(ahead.passes(&(at + 9..at + 10)));
        assert!(ahead.plan().is_some());
        assert_eq!(ahead.misses(&(50_000..50_001), 50_000, BLOCKS), 50_000..50_001);
        assert!(!ahead.begins(&(next..next + 100), 100), "nobody reads there");
        assert_eq!(ahead.plan(), None);
        assert!(!ahead.passes(&(50_001..50_002)));
    }

    #[test]
    fn plan_that_was_overtaken_looks_again() {
        let (mut ahead, at) = warm();
        assert!(ahead.passes(&(at..at + 1)));
        let start = ahead.plan().unwrap();
        ahead.misses(&(start..start + 1), start, BLOCKS);
        assert!(!ahead.begins(&(start..start + 100), 100));
        assert_eq!(ahead.plan(), Some(start + WINDOW_MAX));
        ahead.stop();
        assert!(ahead.passes(&(start + 1..start + 2)));
    }
}
