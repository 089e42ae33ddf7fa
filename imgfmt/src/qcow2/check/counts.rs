//! The number of references to each cluster of a file.

use std::collections::HashMap;

use crate::qcow2::on_disk::cluster::HostCluster;

/// Clusters of one chunk. Memory is allocated for chunks with references.
const CHUNK: u64 = 4096;
/// A count in a chunk that means that a larger one is in a separate map.
const LARGE: u8 = u8::MAX;

/// Counts by cluster: a byte each, because hardly any cluster has more than a few references.
#[derive(Debug, Default)]
pub(super) struct Counts {
    chunks: HashMap<u64, Box<[u8]>>,
    large: HashMap<u64, u64>,
}

impl Counts {
    /// Counts `weight` references for each of the clusters from `first` to `last`.
    pub(super) fn add(&mut self, first: HostCluster, last: HostCluster, weight: u64) {
        self.change(first, last, |count| count.saturating_add(weight));
    }

    /// Subtracts one reference from each of the clusters from `first` to `last`.
    pub(super) fn subtract(&mut self, first: HostCluster, last: HostCluster) {
        self.change(first, last, |count| count.saturating_sub(1));
    }

    fn change(&mut self, first: HostCluster, last: HostCluster, new: impl Fn(u64) -> u64) {
        let (first, last) = (first.number(), last.number());
        let mut cluster = first;
        while cluster <= last {
            let chunk = cluster / CHUNK;
            let stop = (chunk * CHUNK + CHUNK - 1).min(last);
            let counts = self.chunks.entry(chunk).or_insert_with(|| vec![0; CHUNK as usize].into());
            let part = &mut counts[(cluster % CHUNK) as usize..=(stop % CHUNK) as usize];
            for (cluster, count) in (cluster..).zip(part) {
                let old = match *count {
                    LARGE => self.large.remove(&cluster).unwrap_or(u64::from(LARGE)),
                    small => u64::from(small),
                };
                let new = new(old);
                *count = u8::try_from(new).unwrap_or(LARGE);
                if *count == LARGE {
                    self.large.insert(cluster, new);
                }
            }
            cluster = stop + 1;
        }
    }

    /// The number of references to a cluster.
    pub(super) fn get(&self, cluster: HostCluster) -> u64 {
        let cluster = cluster.number();
        let counts = self.chunks.get(&(cluster / CHUNK));
        match counts.map_or(0, |counts| counts[(cluster % CHUNK) as usize]) {
            LARGE => self.large.get(&cluster).copied().unwrap_or(u64::from(LARGE)),
            small => u64::from(small),
        }
    }

    /// The last cluster with references.
    pub(super) fn last(&self) -> Option<HostCluster> {
        self.used().max()
    }

    /// All clusters with references, in no particular order.
    pub(super) fn used(&self) -> impl Iterator<Item = HostCluster> {
        self.chunks.iter().flat_map(|(chunk, counts)| {
            let numbers = (chunk * CHUNK..).zip(counts.iter());
            numbers.filter(|(_, count)| **count != 0).map(|(cluster, _)| HostCluster::new(cluster))
        })
    }

    /// Calls `each` with every cluster from `first` to before `end` and its count.
    pub(super) fn for_each(
        &self,
        first: HostCluster,
        end: HostCluster,
        mut each: impl FnMut(HostCluster, u64),
    ) {
        let (mut cluster, end) = (first.number(), end.number());
        while cluster < end {
            let stop = (cluster / CHUNK * CHUNK + CHUNK).min(end);
            match self.chunks.get(&(cluster / CHUNK)) {
                None => (cluster..stop).for_each(|cluster| each(HostCluster::new(cluster), 0)),
                Some(counts) => {
                    let start = (cluster % CHUNK) as usize;
                    let counts = &counts[start..start + (stop - cluster) as usize];
                    for (cluster, count) in (cluster..stop).zip(counts) {
                        let count = match *count {
                            LARGE => self.large.get(&cluster).copied().unwrap_or(u64::from(LARGE)),
                            small => u64::from(small),
                        };
                        each(HostCluster::new(cluster), count);
                    }
                }
            }
            cluster = stop;
        }
    }

    /// The parts of the file with references, as first and last cluster.
    pub(super) fn parts(&self) -> impl Iterator<Item = (HostCluster, HostCluster)> {
        self.chunks.keys().map(|chunk| {
            let first = HostCluster::new(chunk * CHUNK);
            (first, first + (CHUNK - 1))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(number: u64) -> HostCluster {
        HostCluster::new(number)
    }

    fn counts(counts: &Counts, first: u64, end: u64) -> Vec<u64> {
        let mut found = Vec::new();
        counts.for_each(at(first), at(end), |cluster, count| {
            assert_eq!(cluster, at(first + found.len() as u64));
            found.push(count);
        });
        found
    }

    #[test]
    fn runs_are_counted_across_chunks() {
        let mut all = Counts::default();
        all.add(at(CHUNK - 2), at(CHUNK * 2), 1);
        all.add(at(CHUNK), at(CHUNK), 1);
        assert_eq!(counts(&all, CHUNK - 4, CHUNK + 2), [0, 0, 1, 1, 2, 1]);
        assert_eq!(counts(&all, CHUNK * 2 - 1, CHUNK * 2 + 2), [1, 1, 0]);
        assert_eq!(counts(&all, CHUNK * 100, CHUNK * 100 + 1), [0]);
        assert_eq!(all.parts().count(), 3);
    }

    #[test]
    fn counts_go_beyond_a_byte() {
        let mut all = Counts::default();
        for reference in 1..=1000 {
            all.add(at(7), at(7), 1);
            assert_eq!(counts(&all, 6, 9), [0, reference, 0]);
        }
        all.add(at(8), at(8), 1 << 40);
        all.subtract(at(7), at(8));
        assert_eq!((all.get(at(7)), all.get(at(8)), all.last()), (999, (1 << 40) - 1, Some(at(8))));
        for _ in 0..999 {
            all.subtract(at(7), at(7));
        }
        assert_eq!(counts(&all, 6, 9), [0, 0, (1 << 40) - 1]);
    }
}
