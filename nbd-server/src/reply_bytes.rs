//! The bytes of a reply, which may lie anywhere in their memory.

use std::ops::{Deref, Range};

/// Bytes in memory that may have others around them: what was read with an alignment is sent from
/// where it is.
#[derive(Debug)]
pub(crate) struct ReplyBytes {
    memory: Vec<u8>,
    range: Range<usize>,
}

impl ReplyBytes {
    /// The bytes in this range, as far as it lies in the memory.
    pub(crate) fn new(memory: Vec<u8>, range: Range<usize>) -> Self {
        let end = range.end.min(memory.len());
        Self { memory, range: range.start.min(end)..end }
    }

    /// The memory, and where the bytes lie in it.
    pub(crate) fn into_parts(self) -> (Vec<u8>, Range<usize>) {
        (self.memory, self.range)
    }
}

impl From<Vec<u8>> for ReplyBytes {
    fn from(memory: Vec<u8>) -> Self {
        let range = 0..memory.len();
        Self { memory, range }
    }
}

impl Deref for ReplyBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.range.clone()]
    }
}
