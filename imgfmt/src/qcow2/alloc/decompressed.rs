//! Compressed clusters that were read lately, as they read.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::qcow2::lock::lock;
use crate::qcow2::on_disk::l2::Compressed;

/// How many clusters are kept for the reads that follow.
const CLUSTERS_MAX: usize = 8;

/// Decompressed clusters, by where their compressed bytes lie. Whoever gives these bytes to
/// something else forgets them first.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct Decompressed(Mutex<VecDeque<(Compressed, Arc<[u8]>)>>);

impl Decompressed {
    pub(in crate::qcow2) fn get(&self, compressed: Compressed) -> Option<Arc<[u8]>> {
        let kept = lock(&self.0);
        let found = kept.iter().find(|(key, _)| *key == compressed);
        found.map(|(_, cluster)| Arc::clone(cluster))
    }

    pub(in crate::qcow2) fn keep(&self, compressed: Compressed, cluster: &Arc<[u8]>) {
        let mut kept = lock(&self.0);
        if kept.len() >= CLUSTERS_MAX {
            kept.pop_front();
        }
        kept.push_back((compressed, Arc::clone(cluster)));
    }

    pub(in crate::qcow2) fn forget_all(&self) {
        lock(&self.0).clear();
    }
}
