//! The new L2 entry of a cluster that is zeroed or discarded.

use crate::qcow2::on_disk::l2::{Cluster, EntryFormat};
use crate::storage::ZeroMode;

/// The kind of erasure of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Erase {
    /// The clusters must read as zero.
    Zero(ZeroMode),
    /// Their content is no longer needed.
    Discard,
    /// Zero clusters become unallocated, which reads the same: there is no backing file.
    Forget,
}

/// The kinds of entries that an image can have.
#[derive(Clone, Copy, Debug)]
pub(super) struct EraseRules {
    pub(super) format: EntryFormat,
    /// Whether unallocated clusters may show a backing file, now or when the image is opened the
    /// next time.
    pub(super) names_backing: bool,
}

impl EraseRules {
    /// Whether a cluster can be made to read as zero by its entry alone.
    pub(super) fn can_map_zeroes(self) -> bool {
        self.format.version >= 3 || !self.names_backing
    }

    /// Whether written zeroes need an entry in this layer: it may get another backing file later,
    /// which must not show. As in QEMU, version 2 has no entry for that.
    pub(super) fn marks_zeroes(self) -> bool {
        self.format.version >= 3
    }

    /// Whether unallocated clusters may stay so: they read as zero already.
    pub(super) fn may_stay_empty(self, what: Erase) -> bool {
        !self.names_backing && (!matches!(what, Erase::Zero(_)) || !self.marks_zeroes())
    }

    /// The new state of a cluster when some of its subclusters are erased; `None` if nothing
    /// changes.
    pub(super) fn erased(self, old: Cluster, mask: u32, what: Erase) -> Option<Cluster> {
        let all = self.format.geometry.all_subclusters();
        if what == Erase::Forget {
            return (old.zero != 0).then(Cluster::default);
        }
        let is_empty = old.host.is_none() && old.compressed.is_none() && old.zero == 0;
        let has_space = old.host.is_some() || old.compressed.is_some();
        if !has_space && (is_empty || what == Erase::Discard) && self.may_stay_empty(what) {
            return None;
        }
        let keeps_space = what == Erase::Zero(ZeroMode::KeepAllocated);
        if old.zero & mask == mask && (old.host.is_none() || mask != all || keeps_space) {
            return None;
        }
        if self.format.version < 3 {
            // Without the zero flag and without a backing file, an unallocated entry reads as zero.
            return (!is_empty).then(Cluster::default);
        }
        let zero = old.zero | mask;
        if old.compressed.is_some() {
            return Some(Cluster { zero: all, ..Cluster::default() });
        }
        let allocated = old.allocated & !mask;
        let keeps_host = self.format.has_data_file || allocated != 0 || keeps_space && old.copied;
        let host = if keeps_host { old.host } else { None };
        let copied = old.copied && host.is_some();
        let new = Cluster { host, copied, compressed: None, allocated, zero };
        (new != old).then_some(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::on_disk::geometry::Geometry;
    use crate::units::HostOffset;

    const KEEP: Erase = Erase::Zero(ZeroMode::KeepAllocated);
    const UNMAP: Erase = Erase::Zero(ZeroMode::MayUnmap);

    fn rules(version: u32, names_backing: bool, extended_l2: bool) -> EraseRules {
        let geometry = Geometry { cluster_bits: 16, extended_l2, refcount_order: 4 };
        let format = EntryFormat { geometry, version, has_data_file: false };
        EraseRules { format, names_backing }
    }

    fn data(all: u32) -> Cluster {
        let host = Some(HostOffset::new(5 << 16));
        Cluster { host, copied: true, allocated: all, ..Cluster::default() }
    }

    #[test]
    fn a_discarded_cluster_does_not_show_the_backing_file() {
        let zero = Cluster { zero: 1, ..Cluster::default() };
        assert_eq!(rules(3, true, false).erased(data(1), 1, Erase::Discard), Some(zero));
        assert!(!rules(2, true, false).can_map_zeroes());
        let nothing = Some(Cluster::default());
        assert_eq!(rules(2, false, false).erased(data(1), 1, Erase::Discard), nothing);
    }

    #[test]
    fn zeroes_keep_the_place_of_their_own_cluster_only_if_that_is_asked_for() {
        let rules = rules(3, false, false);
        let kept = Cluster { zero: 1, allocated: 0, ..data(1) };
        assert_eq!(rules.erased(data(1), 1, KEEP), Some(kept));
        assert_eq!(rules.erased(kept, 1, KEEP), None);
        let gone = Cluster { zero: 1, ..Cluster::default() };
        assert_eq!(rules.erased(data(1), 1, UNMAP), Some(gone));
        let shared = Cluster { copied: false, ..data(1) };
        assert_eq!(rules.erased(shared, 1, KEEP), Some(gone));
    }

    #[test]
    fn what_a_part_of_a_cluster_holds_stays_where_it_is() {
        let rules = rules(3, false, true);
        let left = Cluster { zero: 0b1, allocated: !0b1, ..data(u32::MAX) };
        assert_eq!(rules.erased(data(u32::MAX), 0b1, UNMAP), Some(left));
    }

    #[test]
    fn zeroes_over_nothing_are_noted_for_a_backing_file_that_may_come() {
        let nothing = Cluster::default();
        assert_eq!(rules(3, false, false).erased(nothing, 1, Erase::Discard), None);
        let zero = Some(Cluster { zero: 1, ..nothing });
        assert_eq!(rules(3, false, false).erased(nothing, 1, UNMAP), zero);
        assert_eq!(rules(2, false, false).erased(nothing, 1, UNMAP), None);
    }
}
