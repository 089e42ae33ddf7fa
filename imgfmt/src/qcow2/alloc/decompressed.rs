//! Compressed clusters that were read lately, as they read.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::ordered_lock::{OrderedMutex, rank};
use crate::qcow2::on_disk::l2::Compressed;

/// How many clusters are kept for the reads that follow.
const CLUSTERS_MAX: usize = 8;

/// Decompressed clusters, by where their compressed bytes lie. Whoever gives these bytes to
/// something else forgets them first.
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
