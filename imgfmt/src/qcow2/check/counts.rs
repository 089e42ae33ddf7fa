//! How often each cluster of a file is referred to.

use std::collections::HashMap;

/// Clusters of one chunk. Memory is taken for chunks that something refers to.
const CHUNK: u64 = 4096;
/// A count in a chunk that stands for a larger one in a map of its own.
const LARGE: u8 = u8::MAX;

/// Counts by cluster: a byte each, because hardly any cluster has more than a few references.
#[derive(Debug, Default)]
pub(super) struct Counts {
    chunks: HashMap<u64, Box<[u8]>>,
    large: HashMap<u64, u64>,
}

impl Counts {
    /// Counts `weight` references for each of the clusters from `first` to `last`.
    pub(super) fn add(&mut self, first: u64, last: u64, weight: u64) {
        self.change(first, last, |count| count.saturating_add(weight));
    }

    /// Takes one reference away from each of the clusters from `first` to `last`.
    pub(super) fn subtract(&mut self, first: u64, last: u64) {
        self.change(first, last, |count| count.saturating_sub(1));
    }

    fn change(&mut self, first: u64, last: u64, new: impl Fn(u64) -> u64) {
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

    /// How often a cluster is referred to.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let counts = self.chunks.get(&(cluster / CHUNK));
        match counts.map_or(0, |counts| counts[(cluster % CHUNK) as usize]) {
            LARGE => self.large.get(&cluster).copied().unwrap_or(u64::from(LARGE)),
            small => u64::from(small),
        }
    }

    /// The last cluster that something refers to.
    pub(super) fn last(&self) -> Option<u64> {
        self.used().max()
    }

    /// All clusters that something refers to, in no order.
    pub(super) fn used(&self) -> impl Iterator<Item = u64> {
        self.chunks.iter().flat_map(|(chunk, counts)| {
            let numbers = (chunk * CHUNK..).zip(counts.iter());
            numbers.filter(|(_, count)| **count != 0).map(|(cluster, _)| cluster)
        })
    }

    /// Calls `each` with every cluster from `first` to before `end` and its count.
    pub(super) fn for_each(&self, first: u64, end: u64, mut each: impl FnMut(u64, u64)) {
        let mut cluster = first;
        while cluster < end {
            let stop = (cluster / CHUNK * CHUNK + CHUNK).min(end);
            match self.chunks.get(&(cluster / CHUNK)) {
                None => (cluster..stop).for_each(|cluster| each(cluster, 0)),
                Some(counts) => {
                    let start = (cluster % CHUNK) as usize;
                    let counts = &counts[start..start + (stop - cluster) as usize];
                    for (cluster, count) in (cluster..stop).zip(counts) {
                        let count = match *count {
                            LARGE => self.large.get(&cluster).copied().unwrap_or(u64::from(LARGE)),
                            small => u64::from(small),
                        };
                        each(cluster, count);
                    }
                }
            }
            cluster = stop;
        }
    }

    /// The parts of the file, as first and last cluster, that something refers to.
    pub(super) fn parts(&self) -> impl Iterator<Item = (u64, u64)> {
        self.chunks.keys().map(|chunk| (chunk * CHUNK, chunk * CHUNK + CHUNK - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(counts: &Counts, first: u64, end: u64) -> Vec<u64> {
        let mut found = Vec::new();
        counts.for_each(first, end, |cluster, count| {
            assert_eq!(cluster, first + found.len() as u64);
            found.push(count);
        });
        found
    }

    #[test]
    fn runs_are_counted_across_chunks() {
        let mut all = Counts::default();
        all.add(CHUNK - 2, CHUNK * 2, 1);
        all.add(CHUNK, CHUNK, 1);
        assert_eq!(counts(&all, CHUNK - 4, CHUNK + 2), [0, 0, 1, 1, 2, 1]);
        assert_eq!(counts(&all, CHUNK * 2 - 1, CHUNK * 2 + 2), [1, 1, 0]);
        assert_eq!(counts(&all, CHUNK * 100, CHUNK * 100 + 1), [0]);
        assert_eq!(all.parts().count(), 3);
    }

    #[test]
    fn counts_go_beyond_a_byte() {
        let mut all = Counts::default();
        for reference in 1..=1000 {
            all.add(7, 7, 1);
            assert_eq!(counts(&all, 6, 9), [0, reference, 0]);
        }
        all.add(8, 8, 1 << 40);
        all.subtract(7, 8);
        assert_eq!((all.get(7), all.get(8), all.last()), (999, (1 << 40) - 1, Some(8)));
        for _ in 0..999 {
            all.subtract(7, 7);
        }
        assert_eq!(counts(&all, 6, 9), [0, 0, (1 << 40) - 1]);
    }
}
