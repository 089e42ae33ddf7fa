//! Memory for the answers to bulk reads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};

/// Memory of earlier answers, for the next ones. Clones share it.
///
/// The memory that was returned last is used first: it is most likely still in the core's cache. An
/// answer takes memory when its data arrives, not when its request is made, so memory is needed
/// only for unused answers.
#[derive(Debug, Clone, Default)]
pub struct ReadMemory {
    free: Arc<Mutex<Vec<BytesMut>>>,
    most: usize,
}

impl ReadMemory {
    /// Creates a pool that keeps the memory of at most `most` answers. By default none is kept.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { free: Arc::default(), most }
    }

    /// Returns memory without contents, of any capacity.
    #[must_use]
    pub fn take(&self) -> BytesMut {
        let mut memory = self.take_used();
        memory.clear();
        memory
    }

    /// Returns memory of any length, with the bytes of an earlier answer, for a caller that
    /// overwrites them: [resized](BytesMut::resize), it need not be filled with zeroes first.
    #[must_use]
    pub fn take_used(&self) -> BytesMut {
        self.free().pop().unwrap_or_default()
    }

    /// Returns memory to the pool. Has no effect if the memory is shared.
    pub fn give_back(&self, data: Bytes) {
        let Ok(buffer) = data.try_into_mut() else { return };
        let mut free = self.free();
        if free.len() < self.most {
            free.push(buffer);
        }
    }

    fn free(&self) -> MutexGuard<'_, Vec<BytesMut>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_used_last_is_used_first() {
        let memory = ReadMemory::new(2);
        let [first, second] = [vec![1; 64], vec![2; 64]].map(Bytes::from);
        let place = second.as_ptr();
        memory.give_back(first);
        memory.give_back(second);
        let taken = memory.take();
        assert_eq!((taken.as_ptr(), taken.len()), (place, 0));
        assert_eq!(memory.take_used(), [1; 64][..]);
    }

    #[test]
    fn shared_memory_is_not_taken_back() {
        let memory = ReadMemory::new(2);
        let data = Bytes::from(vec![1; 64]);
        memory.give_back(data.clone());
        assert_eq!(memory.take().capacity(), 0);
        assert_eq!(data, vec![1; 64]);
    }

    #[test]
    fn only_so_much_memory_is_kept() {
        let memory = ReadMemory::new(1);
        memory.give_back(Bytes::from(vec![1; 64]));
        memory.give_back(Bytes::from(vec![2; 64]));
        assert_eq!([memory.take(), memory.take()].map(|taken| taken.capacity() > 0), [true, false]);
    }
}
