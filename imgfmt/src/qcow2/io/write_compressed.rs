//! Writing compressed clusters.
//!
//! They are stored one after the other, without alignment, so that several share a cluster of the
//! file; its refcount counts each compressed cluster that touches it.

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::allocator::Allocator;
use crate::qcow2::image::Qcow2;
use crate::qcow2::io::compress;
use crate::qcow2::map::lookup::Lookup;
use crate::qcow2::map::tables::Change;
use crate::qcow2::on_disk::l2::{Cluster, Compressed};
use crate::storage::Durability;
use crate::units::{GuestOffset, HostOffset, Offset as _};

impl Qcow2 {
    /// Writes one cluster, compressed if that saves anything. `data` starts at a cluster's start
    /// and may end before its end only at the end of the disk.
    pub(in crate::qcow2) fn write_compressed_cluster(
        &self,
        offset: GuestOffset,
        data: &[u8],
    ) -> Result<()> {
        let geometry = self.geometry();
        let start = offset.bytes();
        let length = geometry.cluster_size().min(self.size - start);
        if geometry.in_cluster(offset) != 0 || data.len() as u64 != length {
            let detail = format!(
                "compressed data is written in complete clusters of {} bytes",
                geometry.cluster_size()
            );
            return Err(Error::new(ErrorKind::InvalidInput, "write to", detail).at(start));
        }
        let mut cluster = data.to_vec();
        cluster.resize(geometry.cluster_size() as usize, 0);
        // Compressed clusters are not encrypted.
        let packed = match self.mapping.format.has_data_file || self.data.is_encrypted() {
            true => None,
            false => compress::compress(self.metadata.header().compression, &cluster),
        };
        match packed {
            Some(packed) => self.write_packed(offset, &packed),
            None => self.write_range(offset, data),
        }
    }

    fn write_packed(&self, start: GuestOffset, packed: &[u8]) -> Result<()> {
        let geometry = self.geometry();
        self.flusher().relieve_pressure()?;
        let _stripes = self.clusters.lock(geometry.guest_cluster(start), 1, Lookup::MayRead);
        let table = self.mapping.table_for_write(start, self)?;
        self.mapping.refuse_bad(&table, start)?;
        let old = self.mapping.decode(&table, start)?;
        self.clusters.release_quarantine();
        let length = packed.len() as u64;
        let offset = self.clusters.allocate(self, |allocator| {
            let offset = allocator.reserve_bytes(length)?;
            self.commits.changes.note();
            // The allocator is still locked: the bytes after these are not in use yet.
            if let Err(error) = self.end_with_sector(offset + length) {
                allocator.release_bytes(offset, length);
                return Err(self.metadata.io("write to", error, start));
            }
            Ok(offset)
        })?;
        let compressed = Compressed { offset, length };
        let fits = self.mapping.format.encode_compressed(compressed).is_some();
        let written = match fits {
            true => self.metadata.file.write_at(offset, packed, Durability::Cached),
            false => Err(std::io::ErrorKind::FileTooLarge.into()),
        };
        if let Err(error) = written {
            self.clusters.allocator()?.release_bytes(offset, length);
            return Err(self.metadata.io("write to", error, start));
        }
        let new = Cluster { compressed: Some(compressed), ..Cluster::default() };
        let freed = self.mapping.references(old, None, false);
        self.mapping.commit(&table, &[Change { guest: start, cluster: new }], &freed)
    }

    /// Extends the file to the end of the sector in which compressed bytes end: an entry counts
    /// sectors, and other readers read all of them.
    fn end_with_sector(&self, end: HostOffset) -> std::io::Result<()> {
        let sector_end = end.round_up(512).bytes();
        if sector_end == end.bytes() || self.metadata.file.len()? >= sector_end {
            return Ok(());
        }
        self.metadata.file.write_at(HostOffset::new(sector_end - 1), &[0], Durability::Cached)
    }
}

impl Allocator {
    /// Reserves `length` bytes, less than a cluster, after those reserved before if possible.
    fn reserve_bytes(&mut self, length: u64) -> Result<HostOffset> {
        let geometry = self.refcounts.geometry;
        let begun = self.compressed_at.filter(|offset| {
            let count = self.refcounts.refcount(geometry.host_cluster(*offset));
            matches!(count, Ok(count) if count > 0 && count < geometry.refcount_max())
        });
        self.refcounts.refuse_missing()?;
        let room = begun.map_or(0, |offset| geometry.cluster_size() - geometry.in_cluster(offset));
        let offset = match begun {
            Some(offset) if room >= length => {
                self.reference(geometry.host_cluster(offset))?;
                offset
            }
            begun => {
                let next = self.reserve(1)?;
                match begun {
                    Some(offset) if offset + room == next.offset => {
                        if let Err(error) = self.reference(geometry.host_cluster(offset)) {
                            self.release(next);
                            return Err(error);
                        }
                        offset
                    }
                    _ => next.offset,
                }
            }
        };
        let end = offset + length;
        self.compressed_at = (geometry.in_cluster(end) != 0).then_some(end);
        Ok(offset)
    }

    /// Releases reserved bytes that were never used.
    fn release_bytes(&mut self, offset: HostOffset, length: u64) {
        for cluster in self.refcounts.geometry.clusters_touched(offset, length) {
            // Clusters that cannot be released leak, which is harmless.
            let _ = self.dereference(cluster);
        }
    }
}
