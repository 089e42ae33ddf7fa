//! Memory of blocks, which is used again: the first use of a page costs more than what is done with
//! it.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::cache_file::BLOCK_LEN;

/// Most unused buffers: 8 MiB.
const SPARE_MAX: usize = 32;

/// Buffers that nobody uses.
#[derive(Debug, Default)]
pub(super) struct Spare(Mutex<Vec<Vec<u8>>>);

impl Spare {
    /// Returns an empty buffer with room for a block.
    pub(super) fn take(&self) -> Vec<u8> {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spare.pop().unwrap_or_else(|| Vec::with_capacity(BLOCK_LEN))
    }

    /// Makes a buffer a block. It comes back when the block is not used any more.
    pub(super) fn lend(self: &Arc<Self>, data: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { data, spare: Arc::clone(self) })
    }
}

struct Lent {
    data: Vec<u8>,
    spare: Arc<Spare>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut spare = self.spare.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE_MAX {
            self.data.clear();
            spare.push(std::mem::take(&mut self.data));
        }
    }
}
