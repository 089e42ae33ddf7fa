//! The decompressed content of blocks that were read lately.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::mapping::Encoded;
use crate::ordered_lock::{OrderedMutex, rank};

/// How many blocks are kept for the reads that follow: at most 1 MiB, with clusters of up to 64
/// KiB.
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
        let mut kept = self.0.lock();
        kept.truncate(BLOCKS_MAX - 1);
        kept.push_front((encoded, Arc::clone(block)));
    }
}
