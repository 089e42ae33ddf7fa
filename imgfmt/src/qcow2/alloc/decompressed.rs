//! The decompressed content of compressed clusters that were read lately.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::ordered_lock::{OrderedMutex, rank};
use crate::qcow2::on_disk::l2::Compressed;

/// How many clusters are kept for the reads that follow.
const CLUSTERS_MAX: usize = 8;

/// Decompressed clusters, by the place of their compressed bytes. They are forgotten before that
/// place is reused.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct Decompressed(
    OrderedMutex<{ rank::DECOMPRESSED }, VecDeque<(Compressed, Arc<[u8]>)>>,
);

impl Decompressed {
    pub(in crate::qcow2) fn get(&self, compressed: Compressed) -> Option<Arc<[u8]>> {
        let kept = self.0.lock();
        let found = kept.iter().find(|(key, _)| *key == compressed);
        found.map(|(_, cluster)| Arc::clone(cluster))
    }

    pub(in crate::qcow2) fn keep(&self, compressed: Compressed, cluster: &Arc<[u8]>) {
        let mut kept = self.0.lock();
        if kept.len() >= CLUSTERS_MAX {
            kept.pop_front();
        }
        kept.push_back((compressed, Arc::clone(cluster)));
    }

    pub(in crate::qcow2) fn forget_all(&self) {
        self.0.lock().clear();
    }
}
