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

    /// Appends the status of the next `length` bytes; returns false, without appending, if the
    /// limit is reached.
    pub fn push(&mut self, length: u64, flags: u64) -> bool {
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
