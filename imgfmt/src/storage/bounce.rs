//! Buffers with the alignment that direct I/O needs.

use std::sync::MutexGuard;

use crate::ordered_lock::{Ordered, OrderedMutex, rank};

/// Size of a small buffer, in bytes: most requests of guests fit.
const SMALL: usize = 16 * 1024;
/// Size of a large buffer, in bytes, and so the maximum of one transfer.
pub(crate) const LARGE: usize = 512 * 1024;
/// Maximum number of buffers of each size that are kept, 4.5 MiB altogether.
const KEPT_SMALL: usize = 32;
const KEPT_LARGE: usize = 8;

/// A pool of reusable buffers.
#[derive(Debug)]
pub(crate) struct BouncePool {
    /// In bytes.
    alignment: usize,
    small: Buffers,
    large: Buffers,
}

type Buffers = OrderedMutex<{ rank::BOUNCE_BUFFERS }, Vec<Memory>>;

/// Memory that contains an aligned part.
#[derive(Debug)]
pub(super) struct Memory {
    bytes: Vec<u8>,
    /// Where the aligned part begins.
    start: usize,
}

/// A buffer; it returns to its pool when it is dropped.
#[derive(Debug)]
pub(crate) struct Bounce<'a> {
    pool: &'a BouncePool,
    memory: Memory,
    length: usize,
}

impl BouncePool {
    /// Buffers that are aligned to `alignment` bytes, a power of two.
    pub(crate) fn new(alignment: usize) -> Self {
        Self { alignment, small: Buffers::default(), large: Buffers::default() }
    }

    /// A buffer of `length` bytes, at most [`LARGE`], with any content.
    pub(crate) fn take(&self, length: usize) -> Bounce<'_> {
        let (size, _) = class(length);
        let kept = self.kept(length).pop();
        let memory = kept.unwrap_or_else(|| Memory::new(size, self.alignment));
        Bounce { pool: self, memory, length }
    }

    fn kept(&self, length: usize) -> Ordered<MutexGuard<'_, Vec<Memory>>> {
        let kept = if length <= SMALL { &self.small } else { &self.large };
        kept.lock()
    }
}

/// The size of the buffers for this many bytes, and how many of them are kept.
fn class(length: usize) -> (usize, usize) {
    if length <= SMALL { (SMALL, KEPT_SMALL) } else { (LARGE, KEPT_LARGE) }
}

impl Memory {
    /// Zeroes, of which `size` bytes are aligned.
    pub(super) fn new(size: usize, alignment: usize) -> Self {
        let bytes = vec![0; size + alignment];
        // Never resized, so it never moves.
        let start = bytes.as_ptr().addr().wrapping_neg() % alignment;
        Self { bytes, start }
    }

    /// The first `length` aligned bytes.
    pub(super) fn aligned(&self, length: usize) -> &[u8] {
        &self.bytes[self.start..][..length]
    }
}

impl Bounce<'_> {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.memory.aligned(self.length)
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes[self.memory.start..][..self.length]
    }
}

impl Drop for Bounce<'_> {
    fn drop(&mut self) {
        let memory = Memory { bytes: std::mem::take(&mut self.memory.bytes), ..self.memory };
        let mut kept = self.pool.kept(self.length);
        if kept.len() < class(self.length).1 {
            kept.push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_used_again() {
        let pool = BouncePool::new(4096);
        for length in [1, SMALL, SMALL + 1, LARGE] {
            let mut one = pool.take(length);
            let two = pool.take(length);
            for buffer in [&one, &two] {
                assert_eq!(buffer.bytes().as_ptr().addr() % 4096, 0);
                assert_eq!(buffer.bytes().len(), length);
            }
            one.bytes_mut().fill(7);
            drop((one, two));
        }
        assert_eq!(pool.kept(SMALL).len(), 2);
        assert_eq!(pool.kept(LARGE).len(), 2);
    }
}
