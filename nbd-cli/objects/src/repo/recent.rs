//! What was seen lately.

use std::collections::HashSet;
use std::hash::Hash;

/// A set of bounded size, of which the oldest half is let go when it is full.
#[derive(Debug)]
pub(super) struct Recent<T> {
    now: HashSet<T>,
    before: HashSet<T>,
    /// Most elements of each.
    most: usize,
}

impl<T: Eq + Hash> Recent<T> {
    /// A set of `most` elements at least, and of twice as many at most.
    pub(super) fn new(most: usize) -> Self {
        Self { now: HashSet::new(), before: HashSet::new(), most }
    }

    /// Adds an element. Returns whether it is new, as far as this is known.
    pub(super) fn insert(&mut self, element: T) -> bool {
        if self.now.len() >= self.most {
            self.before = std::mem::take(&mut self.now);
        }
        // It is kept longer if it is seen again.
        let is_old = self.before.contains(&element);
        self.now.insert(element) && !is_old
    }

    /// Removes an element.
    pub(super) fn remove(&mut self, element: &T) {
        self.now.remove(element);
        self.before.remove(element);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latest_elements_are_known_and_the_others_are_let_go() {
        let mut recent = Recent::new(10);
        for number in 0..1000_u32 {
            assert!(recent.insert(number));
            for known in number.saturating_sub(9)..=number {
                assert!(!recent.insert(known), "{known} at {number}");
            }
            assert!(recent.now.len() + recent.before.len() <= 20);
        }
        assert!(recent.insert(0));
        recent.remove(&0);
        assert!(recent.insert(0));
    }
}
