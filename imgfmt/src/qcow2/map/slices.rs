//! Slices: the units in which L2 tables are read, cached and changed.
//!
//! With clusters of 64 KiB, a table maps 512 MiB of the disk. If not all tables of the disk fit
//! into the memory limit, reading a complete table for one entry would cost more than reading the
//! data, and few tables would stay in memory. They are then divided into slices of 4 KiB.

use crate::qcow2::on_disk::geometry::Geometry;
use crate::units::{GuestOffset, HostOffset, Offset as _};

/// Default memory limit for L2 tables, in bytes.
const CACHE_BYTES_DEFAULT: u64 = 32 << 20;

/// Size of a slice, in bytes, if not all tables can be kept.
const SMALL: u64 = 4 << 10;

/// Largest size of a slice, in bytes, if all tables can be kept.
const LARGE: u64 = 64 << 10;

/// Number of slices of [`LARGE`] that are kept regardless of the memory limit.
const LARGE_MIN: u64 = 4;

/// The slices of the L2 tables of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Slices {
    geometry: Geometry,
    /// Size of each in bytes: a power of two, at least 512, at most a cluster.
    bytes: u64,
    /// The maximum number of slices in memory.
    pub(super) count_max: usize,
}

impl Slices {
    /// For a disk of `size` bytes whose tables may take up `cache_bytes` of memory.
    pub(super) fn new(geometry: Geometry, size: u64, cache_bytes: Option<u64>) -> Self {
        let all = geometry.l1_entries_for(size).saturating_mul(geometry.cluster_size());
        let allowed = cache_bytes.unwrap_or(CACHE_BYTES_DEFAULT);
        let bytes = geometry.cluster_size().min(if all <= allowed { LARGE } else { SMALL });
        let least = LARGE_MIN * geometry.cluster_size().min(LARGE);
        let count_max = (allowed.min(all).max(least) / bytes) as usize;
        Self { geometry, bytes, count_max }
    }

    /// Words (of 64 bits) of a slice.
    pub(in crate::qcow2) fn words(self) -> usize {
        (self.bytes / 8) as usize
    }

    /// Unit in which changes of tables are recorded, in bytes. A resize may change the size of
    /// slices; slices of all sizes consist of complete units.
    pub(super) fn unit(self) -> u64 {
        SMALL.min(self.geometry.cluster_size())
    }

    /// The offsets of the units of a slice.
    pub(super) fn units(self, slice: HostOffset) -> impl Iterator<Item = HostOffset> {
        (0..self.bytes / self.unit()).map(move |number| slice + number * self.unit())
    }

    /// Number of clusters that a slice maps.
    pub(in crate::qcow2) fn entries(self) -> u64 {
        self.bytes / 8 / self.geometry.entry_words() as u64
    }

    /// Number of bytes of the disk that a slice maps: a power of two.
    pub(in crate::qcow2) fn coverage(self) -> u64 {
        self.entries() << self.geometry.cluster_bits
    }

    /// The end of the part of the disk that the slice of a guest offset maps.
    pub(in crate::qcow2) fn end(self, guest: GuestOffset) -> GuestOffset {
        guest.round_down(self.coverage()).saturating_add(self.coverage())
    }

    /// The offset, in the file, of the slice of a guest offset in the L2 table at `table`.
    #[inline]
    pub(super) fn offset(self, table: HostOffset, guest: GuestOffset) -> HostOffset {
        table + self.geometry.l2_index(guest) as u64 / self.entries() * self.bytes
    }

    /// The index of a guest offset's entry in its slice.
    #[inline]
    pub(super) fn index(self, guest: GuestOffset) -> usize {
        (self.geometry.guest_cluster(guest).number() & (self.entries() - 1)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slices(cluster_bits: u32, size: u64, cache_bytes: Option<u64>) -> Slices {
        let geometry = Geometry { cluster_bits, extended_l2: false, refcount_order: 4 };
        Slices::new(geometry, size, cache_bytes)
    }

    #[test]
    fn tables_of_a_disk_are_kept_whole_as_long_as_all_fit_into_32_mib() {
        let fits = slices(16, 256 << 30, None);
        assert_eq!((fits.bytes, fits.count_max as u64 * fits.bytes), (64 << 10, 32 << 20));
        let too_large = slices(16, (256 << 30) + 1, None);
        assert_eq!(
            (too_large.bytes, too_large.count_max as u64 * too_large.bytes),
            (4096, 32 << 20)
        );
        let more = slices(16, 16 << 40, Some(2 << 30));
        assert_eq!((more.bytes, more.count_max), (64 << 10, 32768));
        // No more memory than the tables of the disk need.
        assert_eq!(slices(16, 4 << 30, Some(1 << 40)).count_max, 8);
        assert_eq!(slices(9, 1 << 30, Some(0)).bytes, 512);
        assert_eq!(slices(21, 1 << 40, None).bytes, 64 << 10);
    }

    #[test]
    fn a_guest_offset_has_one_place_in_one_slice() {
        let slices = slices(16, 16 << 40, None);
        assert_eq!((slices.entries(), slices.coverage()), (512, 32 << 20));
        let guest = GuestOffset::new((512 << 20) + (32 << 20) * 3 + (5 << 16) + 7);
        let table = HostOffset::new(0x50000);
        assert_eq!(slices.offset(table, guest), table + 3 * 4096);
        assert_eq!(slices.index(guest), 5);
        assert_eq!(slices.end(guest).bytes(), (512 << 20) + (32 << 20) * 4);
        assert_eq!(slices.end(GuestOffset::new(u64::MAX)).bytes(), u64::MAX);
    }
}
