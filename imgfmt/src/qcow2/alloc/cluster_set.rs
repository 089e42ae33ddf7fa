//! A set of clusters, by their numbers, for millions that lie together.

use std::collections::BTreeMap;

use crate::qcow2::on_disk::cluster::HostCluster;

const WORDS: usize = 64;
const PAGE_CLUSTERS: u64 = WORDS as u64 * 64;

/// One bit for each cluster; pages of bits that are all clear take up no memory.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct ClusterSet {
    pages: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl ClusterSet {
    pub(in crate::qcow2) fn insert(&mut self, clusters: impl Iterator<Item = HostCluster>) {
        for cluster in clusters.map(HostCluster::number) {
            let page =
                self.pages.entry(cluster / PAGE_CLUSTERS).or_insert_with(|| [0; WORDS].into());
            let bit = cluster % PAGE_CLUSTERS;
            page[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }

    pub(in crate::qcow2) fn contains(&self, cluster: HostCluster) -> bool {
        let bit = cluster.number() % PAGE_CLUSTERS;
        let page = self.pages.get(&(cluster.number() / PAGE_CLUSTERS));
        page.is_some_and(|page| page[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_what_was_inserted_and_nothing_else() {
        let mut set = ClusterSet::default();
        let at = HostCluster::new;
        set.insert(at(4090).run(10));
        set.insert(at(u64::MAX - 1).run(1));
        let found = (4000..4200).filter(|cluster| set.contains(at(*cluster)));
        assert_eq!(found.collect::<Vec<_>>(), (4090..4100).collect::<Vec<_>>());
        assert!(set.contains(at(u64::MAX - 1)));
        assert!(!set.contains(at(u64::MAX)) && !set.contains(at(0)));
        assert_eq!(set.pages.len(), 3);
    }
}
