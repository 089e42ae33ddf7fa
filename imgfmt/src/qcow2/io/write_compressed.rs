//! Writing compressed clusters.
//!
//! They are packed one behind the other, without regard to clusters, so that several share one; the
//! refcount of a cluster of the file counts each compressed cluster that touches it.

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::allocator::Allocator;
use crate::qcow2::image::Qcow2;
use crate::qcow2::io::compress;
use crate::qcow2::map::lookup::Lookup;
use crate::qcow2::map::tables::Change;
use crate::qcow2::on_disk::l2::{Cluster, Compressed};
use crate::storage::Durability;
use crate::units::{GuestOffset, HostOffset};

impl Qcow2 {
    /// Writes one cluster, compressed if that saves anything. `data` starts at a cluster's start and
    /// may end before its end only at the end of the disk.
    pub(in crate::qcow2) fn write_compressed_cluster(
        &self,
        offset: GuestOffset,
        data: &[u8],
    ) -> Result<()> {
        let geometry = self.geometry();
        let start = offset.bytes();
        let length = geometry.cluster_size().min(self.size - start);
        if geometry.in_cluster(start) != 0 || data.len() as u64 != length {
            let detail = format!(
                "compressed data is written in whole clusters of {} bytes",
                geometry.cluster_size()
            );
            return Err(Error::new(ErrorKind::InvalidInput, "write to", detail).at(start));
        }
        let mut cluster = data.to_vec();
        cluster.resize(geometry.cluster_size() as usize, 0);
        let packed = match self.mapping.format.has_data_file {
            true => None,
            false => compress::compress(self.metadata.header().compression, &cluster),
        };
        match packed {
            Some(packed) => self.write_packed(start, &packed),
            None => self.write_range(offset, data),
        }
    }

    fn write_packed(&self, start: u64, packed: &[u8]) -> Result<()> {
        let geometry = self.geometry();
        self.flusher().relieve_pressure()?;
        let _stripes = self.clusters.lock(start >> geometry.cluster_bits, 1, Lookup::MayRead);
        let table = self.mapping.table_for_write(geometry.l1_index(start), self)?;
        self.mapping.refuse_bad(&table, start)?;
        let old = self.mapping.decode(&table, start)?;
        self.clusters.release_quarantine();
        let length = packed.len() as u64;
        let offset = self.clusters.allocate(self, |allocator| {
            let offset = allocator.reserve_bytes(length)?;
            self.commits.changes.note();
            // Still locked: the bytes behind these are nobody's yet.
            if let Err(error) = self.end_with_sector(offset + length) {
                allocator.release_bytes(offset, length);
                return Err(self.metadata.io("write to", error, GuestOffset::new(start)));
            }
            Ok(offset)
        })?;
        let compressed = Compressed { offset, length };
        let fits = self.mapping.format.encode_compressed(compressed).is_some();
        let written = match fits {
            true => {
                self.metadata.file.write_at(HostOffset::new(offset), packed, Durability::Cached)
            }
            false => Err(std::io::ErrorKind::FileTooLarge.into()),
        };
        if let Err(error) = written {
            self.clusters.allocator()?.release_bytes(offset, length);
            return Err(self.metadata.io("write to", error, GuestOffset::new(start)));
        }
        let new = Cluster { compressed: Some(compressed), ..Cluster::default() };
        let freed = self.mapping.references(old, None, false);
        self.mapping.commit(&table, &[Change { guest: start, cluster: new }], &freed)
    }

    /// Makes the file cover the whole sector in which compressed bytes end: an entry counts sectors,
    /// and other readers read all of them.
    fn end_with_sector(&self, end: u64) -> std::io::Result<()> {
        let sector_end = end.next_multiple_of(512);
        if sector_end == end || self.metadata.file.len()? >= sector_end {
            return Ok(());
        }
        self.metadata.file.write_at(HostOffset::new(sector_end - 1), &[0], Durability::Cached)
    }
}

impl Allocator {
    /// Reserves `length` bytes, less than a cluster, behind those reserved before if possible.
    fn reserve_bytes(&mut self, length: u64) -> Result<u64> {
        let bits = self.refcounts.geometry.cluster_bits;
        let size = self.refcounts.geometry.cluster_size();
        let begun = self.compressed_at.filter(|offset| {
            let max = self.refcounts.geometry.refcount_max();
            matches!(self.refcounts.refcount(offset >> bits), Ok(count) if count > 0 && count < max)
        });
        let room = begun.map_or(0, |offset| size - offset % size);
        let offset = match begun {
            Some(offset) if room >= length => {
                self.reference(offset >> bits)?;
                offset
            }
            begun => {
                let next = self.reserve(1)?;
                match begun {
                    Some(offset) if offset + room == next.offset => {
                        if let Err(error) = self.reference(offset >> bits) {
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
        self.compressed_at = (!end.is_multiple_of(size)).then_some(end);
        Ok(offset)
    }

    /// Gives back bytes that were reserved and never used.
    fn release_bytes(&mut self, offset: u64, length: u64) {
        let bits = self.refcounts.geometry.cluster_bits;
        for cluster in offset >> bits..=(offset + length - 1) >> bits {
            // What cannot be given back leaks, which harms nobody.
            let _ = self.dereference(cluster);
        }
    }
}
