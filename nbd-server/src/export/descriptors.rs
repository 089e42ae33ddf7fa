//! Collects block status descriptors.

use nbd_proto::wire::BlockDescriptor;

/// Collects the descriptors of one context: equal neighbours are joined, and their number is
/// limited.
#[derive(Debug, Clone)]
pub struct Descriptors {
    descriptors: Vec<BlockDescriptor>,
    max_count: usize,
}

impl Descriptors {
    /// Creates a collection of at most `max_count` descriptors.
    #[must_use]
    pub const fn new(max_count: usize) -> Self {
        Self { descriptors: Vec::new(), max_count }
    }

    /// Appends the status of the next `length` bytes, nothing if there are none; returns false,
    /// without appending, if the limit is reached.
    pub fn push(&mut self, length: u64, flags: u64) -> bool {
        // Clients refuse an empty descriptor (section "Structured reply types").
        if length == 0 {
            return true;
        }
        if let Some(last) = self.descriptors.last_mut()
            && last.flags == flags
        {
            last.length = last.length.saturating_add(length);
            return true;
        }
        if self.descriptors.len() >= self.max_count {
            return false;
        }
        self.descriptors.push(BlockDescriptor { length, flags });
        true
    }

    /// The number of collected descriptors.
    pub(crate) const fn len(&self) -> usize {
        self.descriptors.len()
    }

    /// Whether the limit is reached.
    pub(crate) const fn is_full(&self) -> bool {
        self.descriptors.len() >= self.max_count
    }

    /// Returns the collected descriptors, in order.
    #[must_use]
    pub fn into_vec(self) -> Vec<BlockDescriptor> {
        self.descriptors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn like_neighbours_are_one_descriptor_and_none_is_empty() {
        let mut status = Descriptors::new(2);
        let parts = [(0, 1), (10, 0), (0, 1), (5, 0), (7, 3), (0, 0), (1, 3)];
        assert!(parts.into_iter().all(|(length, flags)| status.push(length, flags)));
        assert!(!status.push(1, 0), "the limit");
        let found: Vec<_> = status.into_vec().iter().map(|it| (it.length, it.flags)).collect();
        assert_eq!(found, [(15, 0), (8, 3)]);
    }
}
