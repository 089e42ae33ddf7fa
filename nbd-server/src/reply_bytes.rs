//! The bytes of a reply, which may begin anywhere in their memory.

use std::ops::Deref;

/// Bytes in memory that may have others in front of them: what was read with an alignment is sent
/// from where it is.
#[derive(Debug)]
pub(crate) struct ReplyBytes {
    memory: Vec<u8>,
    start: usize,
}

impl ReplyBytes {
    /// The bytes from `start` on; none if that is past the end.
    pub(crate) fn new(memory: Vec<u8>, start: usize) -> Self {
        let start = start.min(memory.len());
        Self { memory, start }
    }

    /// The memory, and where the bytes begin in it.
    pub(crate) fn into_parts(self) -> (Vec<u8>, usize) {
        (self.memory, self.start)
    }
}

impl From<Vec<u8>> for ReplyBytes {
    fn from(memory: Vec<u8>) -> Self {
        Self { memory, start: 0 }
    }
}

impl Deref for ReplyBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}
