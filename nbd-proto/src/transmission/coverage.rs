//! The answered bytes of a READ.

/// The answered ranges of a request, disjoint, merged and relative to its start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Coverage {
    ranges: Ranges,
    chunks: usize,
}

/// Servers almost always answer in ascending order: one range needs no list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Ranges {
    #[default]
    Nothing,
    One(u64, u64),
    /// Sorted.
    List(Vec<(u64, u64)>),
}

impl Coverage {
    /// Adds `start..end` and counts a chunk; returns false if it overlaps an earlier one.
    pub(super) fn add(&mut self, start: u64, end: u64) -> bool {
        self.chunks = self.chunks.saturating_add(1);
        match &mut self.ranges {
            Ranges::Nothing => self.ranges = Ranges::One(start, end),
            Ranges::One(_, last) if *last == start => *last = end,
            Ranges::One(first, _) if *first == end => *first = start,
            Ranges::One(first, last) if *first < end && start < *last => return false,
            Ranges::One(first, last) => {
                let mut list = vec![(*first, *last), (start, end)];
                list.sort_unstable();
                self.ranges = Ranges::List(list);
            }
            Ranges::List(list) => return add_to(list, start, end),
        }
        true
    }

    /// The number of separate answered ranges.
    pub(super) fn ranges(&self) -> usize {
        match &self.ranges {
            Ranges::Nothing => 0,
            Ranges::One(..) => 1,
            Ranges::List(list) => list.len(),
        }
    }

    /// The number of chunks added.
    pub(super) const fn chunks(&self) -> usize {
        self.chunks
    }

    /// Returns true if every byte of a request of `length` bytes is answered.
    pub(super) fn is_complete(&self, length: u64) -> bool {
        let only = match &self.ranges {
            Ranges::Nothing => None,
            Ranges::One(start, end) => Some((*start, *end)),
            Ranges::List(list) => list.first().copied().filter(|_| list.len() == 1),
        };
        length == 0 || only == Some((0, length))
    }
}

/// Adds `start..end` to a sorted list; returns false if it overlaps one of its ranges.
fn add_to(ranges: &mut Vec<(u64, u64)>, start: u64, end: u64) -> bool {
    let next = ranges.partition_point(|range| range.0 < start);
    let touches_next = match ranges.get(next) {
        Some(range) if range.0 < end => return false,
        Some(range) => range.0 == end,
        None => false,
    };
    let previous = next.checked_sub(1);
    let touches_previous = match previous.and_then(|index| ranges.get(index)) {
        Some(range) if range.1 > start => return false,
        Some(range) => range.1 == start,
        None => false,
    };
    match (previous.filter(|_| touches_previous), touches_next) {
        (Some(previous), true) => {
            let end = ranges.remove(next).1;
            if let Some(range) = ranges.get_mut(previous) {
                range.1 = end;
            }
        }
        (Some(previous), false) => {
            if let Some(range) = ranges.get_mut(previous) {
                range.1 = end;
            }
        }
        (None, true) => {
            if let Some(range) = ranges.get_mut(next) {
                range.0 = start;
            }
        }
        (None, false) => ranges.insert(next, (start, end)),
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_in_any_order_complete_a_request() {
        let mut coverage = Coverage::default();
        for (start, end) in [(4, 6), (0, 2), (8, 10), (2, 4), (6, 8)] {
            assert!(!coverage.is_complete(10));
            assert!(coverage.add(start, end));
        }
        assert!(coverage.is_complete(10));
        assert!(!coverage.is_complete(11));
    }

    #[test]
    fn an_overlap_is_seen_from_either_side() {
        let mut coverage = Coverage::default();
        assert!(coverage.add(10, 20));
        for (start, end) in [(10, 20), (5, 11), (19, 30), (12, 13), (0, 40)] {
            assert!(!coverage.add(start, end), "{start}..{end}");
        }
        assert!(coverage.add(20, 21));
        assert!(coverage.add(9, 10));
    }

    #[test]
    fn every_order_of_chunks_is_judged_as_byte_by_byte() {
        let mut random = 1_u64;
        let mut below = |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % limit
        };
        for _ in 0..2000 {
            let (mut coverage, mut answered) = (Coverage::default(), [false; 12]);
            for chunks in 1..=16 {
                let start = below(12);
                let end = start + 1 + below((12 - start).min(4));
                let bytes = &mut answered[start as usize..end as usize];
                let is_fresh = bytes.iter().all(|answered| !answered);
                assert_eq!(coverage.add(start, end), is_fresh, "{start}..{end}: {coverage:?}");
                if is_fresh {
                    bytes.fill(true);
                }
                assert_eq!(
                    coverage.ranges(),
                    answered.chunk_by(|a, b| a == b).filter(|c| c[0]).count()
                );
                assert_eq!(coverage.is_complete(12), answered == [true; 12]);
                assert_eq!(coverage.chunks(), chunks);
            }
        }
    }
}
