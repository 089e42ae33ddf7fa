//! Numbers that follow from the header, computed once.

use crate::qcow2::on_disk::cluster::{GuestCluster, HostCluster};
use crate::units::{GuestOffset, GuestRange, HostOffset, Offset};

/// Sizes and shifts of one image. All sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Clusters are `1 << cluster_bits` bytes.
    pub(crate) cluster_bits: u32,
    /// Whether L2 entries have a second word that describes 32 subclusters each.
    pub(crate) extended_l2: bool,
    /// Refcounts are `1 << refcount_order` bits wide.
    pub(crate) refcount_order: u32,
}

/// The number of subclusters that an extended L2 entry describes.
const SUBCLUSTERS: u32 = 32;

impl Geometry {
    pub(crate) const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// The number of bytes from the start of its cluster to an offset.
    #[inline]
    pub(crate) fn in_cluster(self, offset: impl Offset) -> u64 {
        offset.value() & (self.cluster_size() - 1)
    }

    /// The start of the cluster that contains an offset.
    #[inline]
    pub(crate) fn cluster_start<T: Offset>(self, offset: T) -> T {
        T::at(offset.value() & !(self.cluster_size() - 1))
    }

    /// The cluster of the file that contains an offset.
    pub(crate) const fn host_cluster(self, offset: HostOffset) -> HostCluster {
        HostCluster::new(offset.bytes() >> self.cluster_bits)
    }

    /// The start of a cluster of the file.
    pub(crate) const fn host_offset(self, cluster: HostCluster) -> HostOffset {
        HostOffset::new(cluster.number() << self.cluster_bits)
    }

    /// The cluster of the disk that contains an offset.
    pub(crate) const fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster::new(offset.bytes() >> self.cluster_bits)
    }

    /// The first cluster of the disk that a range touches, and the number of them.
    pub(crate) fn guest_clusters(self, range: GuestRange) -> (GuestCluster, u64) {
        let first = self.guest_cluster(range.offset());
        let end = GuestCluster::new(range.end().bytes().div_ceil(self.cluster_size()));
        (first, end - first)
    }

    /// The clusters of the file that contain `length` bytes from `offset` on.
    pub(crate) fn clusters_touched(
        self,
        offset: HostOffset,
        length: u64,
    ) -> impl Iterator<Item = HostCluster> + Clone {
        let first = self.host_cluster(offset);
        let count = match length {
            0 => 0,
            length => self.host_cluster(offset + (length - 1)) - first + 1,
        };
        first.run(count)
    }

    /// The number of clusters that `length` bytes from a cluster's start take up.
    pub(crate) const fn clusters_of(self, length: u64) -> u64 {
        length.div_ceil(self.cluster_size())
    }

    /// Words (of 64 bits) of one L2 entry.
    pub(crate) const fn entry_words(self) -> usize {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// The number of clusters that one L2 table maps, as a power of two.
    pub(crate) const fn l2_bits(self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// The number of clusters that one L2 table maps.
    pub(crate) const fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// The number of bytes of the disk that one L2 table maps.
    pub(crate) const fn l2_coverage(self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// The index of the L1 entry of a guest offset.
    pub(crate) const fn l1_index(self, guest: GuestOffset) -> u64 {
        guest.bytes() >> (self.l2_bits() + self.cluster_bits)
    }

    /// The first byte of the disk that the L2 table of an L1 entry maps.
    pub(crate) const fn table_start(self, l1_index: u64) -> GuestOffset {
        GuestOffset::new(l1_index.saturating_mul(self.l2_coverage()))
    }

    /// The index of the entry of a guest offset in its L2 table.
    pub(crate) const fn l2_index(self, guest: GuestOffset) -> usize {
        (self.guest_cluster(guest).number() & (self.l2_entries() - 1)) as usize
    }

    /// The number of L1 entries that a disk of `size` bytes needs.
    pub(crate) const fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// The number of subclusters of a cluster: 32, or 1 without subclusters.
    pub(crate) const fn subclusters(self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// Size of a subcluster in bytes.
    pub(crate) const fn subcluster_size(self) -> u64 {
        self.cluster_size() / self.subclusters() as u64
    }

    /// Mask of all subclusters of a cluster.
    pub(crate) const fn all_subclusters(self) -> u32 {
        if self.extended_l2 { u32::MAX } else { 1 }
    }

    /// Mask of the subclusters that the bytes from `start` to `end` (excluded) of a cluster touch.
    pub(crate) fn subcluster_mask(self, start: u64, end: u64) -> u32 {
        if start >= end {
            return 0;
        }
        let first = (start / self.subcluster_size()) as u32;
        let last = ((end - 1) / self.subcluster_size()) as u32;
        mask(first, last - first + 1)
    }

    /// Width of a refcount in bits.
    pub(crate) const fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// The number of clusters that one refcount block counts.
    pub(crate) const fn block_entries(self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// The largest refcount.
    pub(crate) const fn refcount_max(self) -> u64 {
        if self.refcount_order >= 6 { u64::MAX } else { (1 << self.refcount_bits()) - 1 }
    }
}

fn mask(first: u32, count: u32) -> u32 {
    (((1u64 << count) - 1) << first) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_sizes_follow_from_64_kib_clusters() {
        let geometry = Geometry { cluster_bits: 16, extended_l2: false, refcount_order: 4 };
        assert_eq!(geometry.l2_entries(), 8192);
        assert_eq!(geometry.l2_coverage(), 512 << 20);
        assert_eq!(geometry.block_entries(), 32768);
        assert_eq!(geometry.refcount_max(), 65535);
        assert_eq!(geometry.l1_entries_for((512 << 20) + 1), 2);
        assert_eq!(geometry.subcluster_mask(1, 65536), 1);
    }

    #[test]
    fn bytes_touch_the_clusters_from_their_first_to_their_last() {
        let geometry = Geometry { cluster_bits: 16, extended_l2: false, refcount_order: 4 };
        let touched = |offset, length| {
            let clusters = geometry.clusters_touched(HostOffset::new(offset), length);
            clusters.map(HostCluster::number).collect::<Vec<_>>()
        };
        assert_eq!(touched(65536, 65536), [1]);
        assert_eq!(touched(65535, 2), [0, 1]);
        assert_eq!(touched(65536, 0), [0; 0]);
        let cluster = geometry.host_cluster(HostOffset::new(3 << 16 | 5));
        assert_eq!(geometry.host_offset(cluster).bytes(), 3 << 16);
    }

    #[test]
    fn subclusters_are_a_32nd_of_a_cluster() {
        let geometry = Geometry { cluster_bits: 16, extended_l2: true, refcount_order: 4 };
        assert_eq!(geometry.l2_entries(), 4096);
        assert_eq!(geometry.subcluster_size(), 2048);
        assert_eq!(geometry.subcluster_mask(2047, 2049), 0b11);
        assert_eq!(geometry.subcluster_mask(0, 65536), u32::MAX);
    }
}
