//! The order in which a stream copies the parts of a disk: first what readers ask for, then what
//! follows that, then everything from the start.

use std::collections::{BTreeMap, VecDeque};

use crate::units::{GuestRange, span};
use crate::wanted::Asking;

/// How much is copied after what a reader has asked for, in bytes.
const NEAR: u64 = 8 << 20;

/// The maximum number of places near to which parts are still to be copied.
const PLACES_MAX: usize = 16;

/// The maximum number of ranges that are remembered as copied before their turn.
const AHEAD_MAX: usize = 1 << 16;

/// What is copied before its turn.
#[derive(Debug)]
pub(super) struct Order<'a> {
    readers: Option<Asking<'a>>,
    /// The size of the disk in bytes.
    size: u64,
    /// The size of a part in bytes; parts begin at its multiples.
    step: u64,
    /// Starts of the parts that were asked for, and what follows them, the latest first.
    asked: VecDeque<u64>,
    near: VecDeque<GuestRange>,
    ahead: Ahead,
}

/// The ranges that were copied before their turn: their ends, by their starts. They do not touch.
#[derive(Debug, Default)]
struct Ahead(BTreeMap<u64, u64>);

impl<'a> Order<'a> {
    pub(super) fn new(readers: Option<Asking<'a>>, size: u64, step: u64) -> Self {
        let (asked, near) = (VecDeque::new(), VecDeque::new());
        Self { readers, size, step, asked, near, ahead: Ahead::default() }
    }

    /// Returns a part that is to be copied before its turn; that of all before `done` has come. It
    /// counts as copied from now on.
    pub(super) fn next_before_turn(&mut self, done: u64) -> Option<GuestRange> {
        // Once: readers of what has nothing to be copied must not keep it here.
        self.take_from_readers();
        while let Some(start) = self.next_start() {
            let part = span(start, start.saturating_add(self.step).min(self.size));
            // Of a part whose turn has come for its beginning, only the rest is remembered.
            let rest = span(start.max(done), part.end().bytes().max(done));
            if !rest.is_empty() && !self.ahead.has(rest) && self.ahead.add(part) {
                return Some(part);
            }
        }
        None
    }

    fn take_from_readers(&mut self) {
        let readers = self.readers.iter().flat_map(|readers| std::iter::from_fn(|| readers.take()));
        let latest: Vec<u64> = readers.take(PLACES_MAX).collect();
        for offset in latest.into_iter().rev() {
            let start = offset - offset % self.step;
            let next = start.saturating_add(self.step);
            self.asked.push_front(start);
            self.near.push_front(span(next, next.saturating_add(NEAR).min(self.size)));
        }
        self.asked.truncate(PLACES_MAX);
        self.near.truncate(PLACES_MAX);
    }

    /// The start of a part that may have been copied already.
    fn next_start(&mut self) -> Option<u64> {
        if let Some(start) = self.asked.pop_front() {
            return Some(start);
        }
        loop {
            let near = self.near.front_mut()?;
            if near.is_empty() {
                self.near.pop_front();
                continue;
            }
            let start = near.offset().bytes();
            *near = span(start.saturating_add(self.step), near.end().bytes());
            return Some(start);
        }
    }

    /// Whether a part was copied before its turn.
    pub(super) fn is_copied(&self, part: GuestRange) -> bool {
        self.ahead.has(part)
    }

    /// The turn of everything from `start` to `end` has come: forgets what was copied before, and
    /// returns how much of it is there, in bytes.
    pub(super) fn pass(&mut self, start: u64, end: u64) -> u64 {
        self.ahead.remove_before(end, start)
    }
}

impl Ahead {
    fn has(&self, range: GuestRange) -> bool {
        let before = self.0.range(..=range.offset().bytes()).next_back();
        before.is_some_and(|(_, end)| *end >= range.end().bytes())
    }

    /// Adds a range that has not been added; false if there are too many.
    fn add(&mut self, range: GuestRange) -> bool {
        let (mut start, mut end) = (range.offset().bytes(), range.end().bytes());
        if let Some(after) = self.0.remove(&end) {
            end = after;
        }
        if let Some((before, _)) =
            self.0.range(..start).next_back().filter(|(_, end)| **end >= start)
        {
            start = *before;
        }
        let is_full = self.0.len() >= AHEAD_MAX && !self.0.contains_key(&start);
        if !is_full {
            self.0.insert(start, end);
        }
        !is_full
    }

    /// Removes what begins before `end`, and returns how much of it lies between `start` and that.
    fn remove_before(&mut self, end: u64, start: u64) -> u64 {
        let mut removed = 0;
        while let Some(first) = self.0.first_entry().filter(|first| *first.key() < end) {
            let (from, to) = first.remove_entry();
            removed += to.min(end).saturating_sub(from.max(start));
            if to > end {
                self.0.insert(end, to);
            }
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wanted::Wanted;

    const MIB: u64 = 1 << 20;

    fn parts(order: &mut Order<'_>, done: u64) -> Vec<u64> {
        let next = || order.next_before_turn(done);
        std::iter::from_fn(next).map(|part| part.offset().bytes() / MIB).collect()
    }

    #[test]
    fn what_was_asked_for_last_comes_first_and_what_follows_it_after_that() {
        let wanted = Wanted::default();
        let mut order = Order::new(Some(wanted.ask()), 100 * MIB, MIB);
        assert!(parts(&mut order, 0).is_empty());
        for at in [20, 40, 90] {
            wanted.note(at * MIB + 5);
        }
        let found = parts(&mut order, 0);
        assert_eq!(found[..3], [90, 40, 20]);
        let near: Vec<_> = [91..99, 41..49, 21..29].into_iter().flatten().collect();
        assert_eq!(found[3..], near);
        // What is asked for meanwhile comes before what is near to that.
        wanted.note(60 * MIB);
        assert_eq!(order.next_before_turn(0), Some(span(60 * MIB, 61 * MIB)));
        wanted.note(70 * MIB);
        let rest: Vec<_> = [70..79, 61..69].into_iter().flatten().collect();
        assert_eq!(parts(&mut order, 0), rest);
        // Once only; and what is done is not copied again.
        wanted.note(20 * MIB);
        wanted.note(50 * MIB);
        assert_eq!(parts(&mut order, 52 * MIB + 1), [52, 53, 54, 55, 56, 57, 58]);
        wanted.note(99 * MIB);
        assert_eq!(parts(&mut order, 60 * MIB), [99], "the disk ends there");
        assert!(order.is_copied(span(22 * MIB, 24 * MIB)));
        assert!(!order.is_copied(span(22 * MIB, 30 * MIB)));
    }

    #[test]
    fn what_was_copied_before_its_turn_is_counted_once() {
        let wanted = Wanted::default();
        let mut order = Order::new(Some(wanted.ask()), 100 * MIB, MIB);
        wanted.note(10 * MIB);
        assert_eq!(parts(&mut order, 0).len(), 9);
        assert_eq!(order.pass(0, 10 * MIB), 0);
        assert_eq!(order.pass(10 * MIB, 12 * MIB + 1), 2 * MIB + 1);
        assert_eq!(order.pass(12 * MIB + 1, 12 * MIB + 1), 0);
        assert_eq!(order.pass(12 * MIB + 1, 14 * MIB), 2 * MIB - 1);
        // A part that had begun already.
        assert_eq!(order.pass(15 * MIB, 100 * MIB), 4 * MIB);
        assert!(order.ahead.0.is_empty());
    }

    #[test]
    fn a_part_whose_turn_has_come_for_its_beginning_is_not_copied_again() {
        let wanted = Wanted::default();
        let mut order = Order::new(Some(wanted.ask()), 100 * MIB, MIB);
        wanted.note(10 * MIB);
        assert_eq!(parts(&mut order, 0).len(), 9);
        assert_eq!(order.pass(0, 10 * MIB + MIB / 2), MIB / 2);
        wanted.note(10 * MIB);
        assert!(parts(&mut order, 10 * MIB + MIB / 2).is_empty());
        assert_eq!(order.pass(10 * MIB + MIB / 2, 11 * MIB), MIB / 2);
        assert_eq!(order.pass(11 * MIB, 100 * MIB), 8 * MIB);
    }

    #[test]
    fn readers_all_over_a_huge_disk_take_little_memory() {
        let mut ahead = Ahead::default();
        for at in (0..AHEAD_MAX as u64).map(|at| at * 2 * MIB) {
            assert!(ahead.add(span(at, at + MIB)));
        }
        assert!(!ahead.add(span(1 << 60, (1 << 60) + MIB)));
        assert!(ahead.add(span(MIB, 2 * MIB)), "it joins two");
        assert_eq!(ahead.0.len(), AHEAD_MAX - 1);
        assert!(ahead.has(span(0, 3 * MIB)));
    }
}
