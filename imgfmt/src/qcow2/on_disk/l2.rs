//! L2 entries. Only this module knows their bits.
//!
//! ```text
//! bit 63      COPIED: the refcount is exactly 1, the cluster may be written in place
//! bit 62      compressed: the other bits are laid out differently, see `Compressed`
//! bits 9-55   offset of the cluster in the file
//! bit 0       reads as zero (version 3, without subclusters)
//! ```
//!
//! With subclusters a second word follows: bits 0-31 are the allocated subclusters, bits 32-63
//! those that read as zero. Both set is an error. In this crate, an image without subclusters has a
//! single "subcluster", so that other modules treat both kinds alike.

use crate::qcow2::on_disk::geometry::Geometry;
use crate::units::HostOffset;

pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
pub(crate) const ZERO: u64 = 1;

/// The L2 table that an L1 entry names, if it names one.
#[inline]
pub(crate) fn table_of(l1_entry: u64) -> Option<HostOffset> {
    Some(l1_entry & OFFSET_MASK).filter(|offset| *offset != 0).map(HostOffset::new)
}

/// The properties of an image that its entries depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryFormat {
    pub(crate) geometry: Geometry,
    pub(crate) version: u32,
    /// Whether data is in a separate file, where offset 0 is a valid place.
    pub(crate) has_data_file: bool,
}

/// The place of a compressed cluster's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Compressed {
    pub(crate) offset: HostOffset,
    /// Upper bound: the stream may end before.
    pub(crate) length: u64,
}

/// A decoded L2 entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cluster {
    /// Its place in the file, even if no subcluster uses it yet.
    pub(crate) host: Option<HostOffset>,
    /// Whether the host cluster belongs to this entry alone.
    pub(crate) copied: bool,
    pub(crate) compressed: Option<Compressed>,
    /// Subclusters whose data is in the host cluster.
    pub(crate) allocated: u32,
    /// Subclusters that read as zero.
    pub(crate) zero: u32,
}

/// The content of one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subcluster {
    /// Data at this offset in the file, where the subcluster starts.
    Stored(HostOffset),
    Zero,
    Compressed(Compressed),
    /// No content in this image: the backing file's content shows.
    Unallocated,
}

impl EntryFormat {
    /// Decodes an entry; the error describes its damage.
    pub(crate) fn decode(self, entry: u64, bitmap: u64) -> Result<Cluster, &'static str> {
        if entry & COMPRESSED != 0 {
            return self.decode_compressed(entry);
        }
        let offset = HostOffset::new(entry & OFFSET_MASK);
        if self.geometry.in_cluster(offset) != 0 {
            return Err("an L2 entry points into the middle of a cluster");
        }
        let copied = entry & COPIED != 0;
        let has_host = offset.bytes() != 0 || (self.has_data_file && copied);
        let mut cluster =
            Cluster { host: has_host.then_some(offset), copied, ..Cluster::default() };
        if self.geometry.extended_l2 {
            cluster.allocated = bitmap as u32;
            cluster.zero = (bitmap >> 32) as u32;
            if cluster.allocated & cluster.zero != 0 {
                return Err("an L2 entry has a subcluster that is both data and zero");
            }
            if cluster.allocated != 0 && !has_host {
                return Err("an L2 entry has allocated subclusters but no cluster");
            }
        } else if entry & ZERO != 0 {
            if self.version < 3 {
                return Err("an L2 entry has the zero flag, which version 2 does not have");
            }
            cluster.zero = 1;
        } else if has_host {
            cluster.allocated = 1;
        }
        Ok(cluster)
    }

    fn decode_compressed(self, entry: u64) -> Result<Cluster, &'static str> {
        if self.has_data_file {
            return Err("an L2 entry is compressed although there is a data file");
        }
        let compressed = self.compressed_place(entry);
        let offset = compressed.offset.bytes();
        if offset >> 56 != 0 || offset == 0 {
            return Err("an L2 entry points to an invalid place");
        }
        Ok(Cluster { compressed: Some(compressed), ..Cluster::default() })
    }

    /// The place to which the entry of a compressed cluster points, which may be invalid.
    pub(crate) fn compressed_place(self, entry: u64) -> Compressed {
        let length_bits = self.geometry.cluster_bits - 8;
        let offset_bits = 62 - length_bits;
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = ((entry >> offset_bits) & ((1 << length_bits) - 1)) + 1;
        let length = sectors * 512 - offset % 512;
        Compressed { offset: HostOffset::new(offset), length }
    }

    /// Encodes an entry. A compressed cluster that does not fit into an entry becomes an empty
    /// entry: see [`encode_compressed`](Self::encode_compressed).
    pub(crate) fn encode(self, cluster: Cluster) -> (u64, u64) {
        if let Some(compressed) = cluster.compressed {
            return (self.encode_compressed(compressed).unwrap_or(0), 0);
        }
        let mut entry = cluster.host.map_or(0, HostOffset::bytes);
        if cluster.copied && cluster.host.is_some() {
            entry |= COPIED;
        }
        if self.geometry.extended_l2 {
            (entry, u64::from(cluster.allocated) | u64::from(cluster.zero) << 32)
        } else {
            if cluster.zero != 0 {
                entry |= ZERO;
            }
            (entry, 0)
        }
    }

    /// Encodes an entry for a compressed cluster, if its place and length fit into one.
    pub(crate) fn encode_compressed(self, compressed: Compressed) -> Option<u64> {
        let length_bits = self.geometry.cluster_bits - 8;
        let offset_bits = 62 - length_bits;
        let offset = compressed.offset.bytes();
        let sectors = (offset % 512 + compressed.length).div_ceil(512).checked_sub(1)?;
        let fits = offset >> offset_bits.min(56) == 0 && sectors >> length_bits == 0;
        fits.then_some(COMPRESSED | sectors << offset_bits | offset)
    }
}

impl Cluster {
    /// The content of the subcluster of this number.
    pub(crate) fn content(&self, geometry: Geometry, subcluster: u32) -> Subcluster {
        let bit = 1 << subcluster;
        match (self.compressed, self.host) {
            (Some(compressed), _) => Subcluster::Compressed(compressed),
            (None, Some(host)) if self.allocated & bit != 0 => {
                Subcluster::Stored(host + u64::from(subcluster) * geometry.subcluster_size())
            }
            _ if self.zero & bit != 0 => Subcluster::Zero,
            _ => Subcluster::Unallocated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(extended_l2: bool) -> EntryFormat {
        let geometry = Geometry { cluster_bits: 16, extended_l2, refcount_order: 4 };
        EntryFormat { geometry, version: 3, has_data_file: false }
    }

    #[test]
    fn entries_survive_decoding_and_encoding() {
        for entry in [0, 1, 0x50000, 0x50001, COPIED | 0x50000, COPIED | 0x50001] {
            let cluster = format(false).decode(entry, 0).unwrap();
            assert_eq!(format(false).encode(cluster), (entry, 0), "{entry:#x}");
        }
        let (entry, bitmap) = (COPIED | 0x70000, 0x0000_ff00_0000_00ff);
        let cluster = format(true).decode(entry, bitmap).unwrap();
        assert_eq!(format(true).encode(cluster), (entry, bitmap));
        assert_eq!(
            cluster.content(format(true).geometry, 1),
            Subcluster::Stored(HostOffset::new(0x70800))
        );
        assert_eq!(cluster.content(format(true).geometry, 8), Subcluster::Zero);
        assert_eq!(cluster.content(format(true).geometry, 31), Subcluster::Unallocated);
    }

    #[test]
    fn the_bits_of_a_compressed_entry_are_split_at_54_for_64_kib() {
        let compressed = Compressed { offset: HostOffset::new(0x50123), length: 1024 - 0x123 };
        let entry = format(false).encode_compressed(compressed).unwrap();
        assert_eq!(entry, COMPRESSED | 1 << 54 | 0x50123);
        let cluster = format(false).decode(entry, 0).unwrap();
        assert_eq!(cluster.compressed, Some(compressed));
    }

    #[test]
    fn impossible_entries_are_refused() {
        assert!(format(false).decode(0x200, 0).is_err());
        assert!(format(true).decode(0x50000, 1 << 32 | 1).is_err());
        assert!(format(true).decode(0, 1).is_err());
        assert!(EntryFormat { version: 2, ..format(false) }.decode(1, 0).is_err());
        assert!(format(false).decode(COMPRESSED, 0).is_err());
    }
}
