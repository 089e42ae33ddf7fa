//! Buffers for what stores send, which are used again: the first use of a page costs more than what
//! is done with it.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Length of a buffer, in bytes.
pub(crate) const BUFFER_LEN: usize = 256 << 10;

/// Most unused buffers: 8 MiB.
const SPARE_MAX: usize = 32;

/// Buffers that nobody uses.
#[derive(Debug, Default)]
pub(crate) struct Spare(Mutex<Vec<Vec<u8>>>);

impl Spare {
    /// Returns a buffer of [`BUFFER_LEN`] bytes, of any contents.
    pub(crate) fn take(&self) -> Vec<u8> {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spare.pop().unwrap_or_else(|| vec![0; BUFFER_LEN])
    }

    /// Takes a buffer back.
    pub(crate) fn put(&self, buffer: Vec<u8>) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE_MAX && buffer.len() == BUFFER_LEN {
            spare.push(buffer);
        }
    }

    /// Hands out the first bytes of a buffer. It comes back when they are not used any more.
    pub(crate) fn lend(self: &Arc<Self>, buffer: Vec<u8>, length: usize) -> Bytes {
        Bytes::from_owner(Lent { buffer, length, spare: Arc::clone(self) })
    }
}

struct Lent {
    buffer: Vec<u8>,
    length: usize,
    spare: Arc<Spare>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.spare.put(std::mem::take(&mut self.buffer));
    }
}
