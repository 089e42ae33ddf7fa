//! The decompressed content of blocks that were read lately.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::mapping::Encoded;
use crate::ordered_lock::{OrderedMutex, rank};

/// How many bytes of them are kept for the reads that follow.
const BYTES_MAX: usize = 8 << 20;

/// How many blocks are kept.
const BLOCKS_MAX: usize = 16;

/// Decompressed blocks, by the place of their compressed bytes, which never change.
#[derive(Debug, Default)]
pub(super) struct Decoded(OrderedMutex<{ rank::FOREIGN_DECODED }, VecDeque<(Encoded, Arc<[u8]>)>>);

impl Decoded {
    pub(super) fn get(&self, encoded: Encoded) -> Option<Arc<[u8]>> {
        let kept = self.0.lock();
        let found = kept.iter().find(|(key, _)| *key == encoded);
        found.map(|(_, block)| Arc::clone(block))
    }

    pub(super) fn keep(&self, encoded: Encoded, block: &Arc<[u8]>) {
        let count = (BYTES_MAX / block.len().max(1)).clamp(1, BLOCKS_MAX);
        let mut kept = self.0.lock();
        kept.truncate(count - 1);
        kept.push_front((encoded, Arc::clone(block)));
    }
}
