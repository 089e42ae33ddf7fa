//! The answered bytes of a READ.

/// The answered ranges of a request, sorted, disjoint, merged and relative to its start.
///
/// Servers almost always answer in ascending order, so the list almost always has one element.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Coverage {
    ranges: Vec<(u64, u64)>,
    chunks: usize,
}

impl Coverage {
    /// Adds `start..end` and counts a chunk; returns false if it overlaps an earlier one.
    pub(super) fn add(&mut self, start: u64, end: u64) -> bool {
        self.chunks = self.chunks.saturating_add(1);
        let next = self.ranges.partition_point(|range| range.0 < start);
        let touches_next = match self.ranges.get(next) {
            Some(range) if range.0 < end => return false,
            Some(range) => range.0 == end,
            None => false,
        };
        let previous = next.checked_sub(1);
        let touches_previous = match previous.and_then(|index| self.ranges.get(index)) {
            Some(range) if range.1 > start => return false,
            Some(range) => range.1 == start,
            None => false,
        };
        match (previous.filter(|_| touches_previous), touches_next) {
            (Some(previous), true) => {
                let end = self.ranges.remove(next).1;
                if let Some(range) = self.ranges.get_mut(previous) {
                    range.1 = end;
                }
            }
            (Some(previous), false) => {
                if let Some(range) = self.ranges.get_mut(previous) {
                    range.1 = end;
                }
            }
            (None, true) => {
                if let Some(range) = self.ranges.get_mut(next) {
                    range.0 = start;
                }
            }
            (None, false) => self.ranges.insert(next, (start, end)),
        }
        true
    }

    /// The number of separate answered ranges.
    pub(super) fn ranges(&self) -> usize {
        self.ranges.len()
    }

    /// The number of chunks added.
    pub(super) const fn chunks(&self) -> usize {
        self.chunks
    }

    /// Returns true if every byte of a request of `length` bytes is answered.
    pub(super) fn is_complete(&self, length: u64) -> bool {
        length == 0 || self.ranges == [(0, length)]
    }
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
}
