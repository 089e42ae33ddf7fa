//! Allocation: finding free clusters, and the quarantine of those that were freed.
//!
//! The life of a cluster: *reserved* (its refcount is 1, nothing points to it), then *committed*
//! (an entry points to it) or *released* (nothing ever did). When its entry goes away it is
//! *freed*: it waits until that is on disk and until every lease taken before has ended; only then
//! its refcount falls and it can be reserved again.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::lease::ClosedGeneration;
use crate::qcow2::alloc::cluster_set::ClusterSet;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::header::Header;
use crate::qcow2::on_disk::refcount::Refcounts;
use crate::qcow2::on_disk::words::{read_error, read_words};
use crate::storage::Storage;
use crate::units::{HostOffset, Offset as _};

/// The largest refcount table that is made, as in QEMU.
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

/// Clusters that were reserved, next to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reserved {
    pub(crate) offset: HostOffset,
    pub(crate) clusters: u64,
    /// They lie where the file has never been: they read as zero.
    pub(crate) never_written: bool,
}

impl Reserved {
    /// No cluster.
    pub(in crate::qcow2) const fn nothing() -> Self {
        Self { offset: HostOffset::new(0), clusters: 0, never_written: false }
    }
}

/// A reference that went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Freed {
    pub(crate) cluster: HostCluster,
    /// Its space is to be given back to the file system.
    pub(crate) punch: bool,
}

/// Freed clusters that wait for leases; the metadata that freed them is on disk.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) generation: ClosedGeneration,
    pub(crate) freed: Vec<Freed>,
}

/// Batches in the order in which their generations were closed.
pub(crate) type Quarantine = VecDeque<Batch>;

/// A new place for a refcount table that has outgrown the old one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TablePlace {
    pub(crate) offset: HostOffset,
    pub(crate) clusters: u64,
}

impl TablePlace {
    /// The bytes of the file that the table takes up.
    pub(in crate::qcow2) fn range(self, geometry: Geometry) -> Range<HostOffset> {
        self.offset..self.offset.saturating_add(self.clusters << geometry.cluster_bits)
    }
}

/// Finds free clusters of one file.
#[derive(Debug)]
pub(crate) struct Allocator {
    pub(crate) refcounts: Refcounts,
    pub(in crate::qcow2) table_place: TablePlace,
    pub(in crate::qcow2) new_table_place: Option<TablePlace>,
    /// No cluster below this one is free.
    first_free: HostCluster,
    /// The file was never written from this offset on.
    never_written_from: HostOffset,
    /// Where the next compressed cluster may begin: after the last one, in the same cluster.
    pub(in crate::qcow2) compressed_at: Option<HostOffset>,
    /// Where the file ended when it was opened: before that a missing refcount block may hide data.
    file_end: HostOffset,
    /// Indexes of the refcount blocks that count clusters in use, once they are known.
    used_blocks: Option<HashSet<u64>>,
    /// A reservation has failed because they are not known.
    pub(in crate::qcow2) wants_used_blocks: bool,
    /// Places that can never be free: if their refcount says so, the image is damaged.
    pub(in crate::qcow2) protected: Vec<Range<HostOffset>>,
    /// The clusters reserved since the image was opened. They were free then: no entry that was on
    /// disk at that time can name them.
    pub(in crate::qcow2) reserved_since_open: ClusterSet,
}

impl Allocator {
    pub(crate) fn new(refcounts: Refcounts, table_place: TablePlace, file_length: u64) -> Self {
        let file_end = HostOffset::new(file_length).round_up(refcounts.geometry.cluster_size());
        Self {
            refcounts,
            table_place,
            new_table_place: None,
            first_free: HostCluster::new(0),
            never_written_from: file_end,
            compressed_at: None,
            file_end,
            used_blocks: None,
            wants_used_blocks: false,
            protected: Vec::new(),
            reserved_since_open: ClusterSet::default(),
        }
    }

    /// The end of the file when it was opened, or of what was reserved since, whichever is later.
    pub(in crate::qcow2) fn end(&self) -> HostOffset {
        self.never_written_from
    }

    /// Notes which refcount blocks count clusters in use.
    pub(in crate::qcow2) fn note_used_blocks(&mut self, used: HashSet<u64>) {
        self.used_blocks = Some(used);
    }

    /// Reserves between 1 and `count_max` clusters that lie next to each other.
    pub(crate) fn reserve(&mut self, count_max: u64) -> Result<Reserved> {
        let (first, count) = self.find(count_max)?;
        self.take(first, count)
    }

    /// As [`reserve`](Self::reserve) if there are free clusters in the first refcount block that
    /// may have some, and that is in memory.
    pub(crate) fn reserve_in_memory(&mut self, count_max: u64) -> Result<Option<Reserved>> {
        let entries = self.refcounts.geometry.block_entries();
        let count_max = usize::try_from(count_max.clamp(1, entries)).unwrap_or(1);
        let (index, entry) = self.refcounts.place(self.first_free);
        if !self.refcounts.is_in_memory(index) {
            return Ok(None);
        }
        let Some((free, count)) = self.refcounts.find_free(index, entry, count_max)? else {
            return Ok(None);
        };
        let first = self.refcounts.first_of_block(index) + free as u64;
        self.first_free = first;
        self.take(first, count as u64).map(Some)
    }

    /// Reserves exactly `count` clusters that lie next to each other.
    pub(crate) fn reserve_exact(&mut self, count: u64) -> Result<Reserved> {
        if count <= 1 {
            return self.reserve(1);
        }
        if count >= self.refcounts.geometry.block_entries() {
            // A refcount block lies in the first cluster that it counts, so no run is longer.
            let detail = "its clusters are too small for a table of that size";
            return Err(Error::new(ErrorKind::Unsupported, "grow", detail));
        }
        // After everything, so that the first clusters that fit are found at once.
        let mut first = self.refcounts.geometry.host_cluster(self.never_written_from);
        loop {
            let mut cluster = first;
            while cluster < first + count && self.refcount_with_block(cluster)? == 0 {
                cluster += 1;
            }
            if cluster == first + count {
                break;
            }
            first = cluster + 1;
        }
        self.take(first, count)
    }

    /// Releases reserved clusters that were never used.
    pub(crate) fn release(&mut self, reserved: Reserved) {
        let first = self.refcounts.geometry.host_cluster(reserved.offset);
        for cluster in first.run(reserved.clusters) {
            // If the block can no longer be read the cluster leaks, which is harmless.
            if self.refcounts.set_refcount(cluster, 0).is_ok() {
                self.first_free = self.first_free.min(cluster);
            }
        }
    }

    /// Takes one reference away.
    pub(crate) fn dereference(&mut self, cluster: HostCluster) -> Result<()> {
        let count = self.refcounts.refcount(cluster)?;
        if count == 0 {
            return Err(damaged("a cluster that is in use has no references"));
        }
        self.refcounts.set_refcount(cluster, count - 1)?;
        if count == 1 {
            self.first_free = self.first_free.min(cluster);
            // A cluster that is free again is not the one in which the next may begin.
            let geometry = self.refcounts.geometry;
            self.compressed_at =
                self.compressed_at.filter(|offset| geometry.host_cluster(*offset) != cluster);
        }
        Ok(())
    }

    /// Adds one reference to a cluster that has some already.
    pub(crate) fn reference(&mut self, cluster: HostCluster) -> Result<u64> {
        let count = self.refcounts.refcount(cluster)?;
        if count == 0 {
            return Err(damaged("a cluster that is in use has no references"));
        }
        self.refcounts.set_refcount(cluster, count.saturating_add(1))?;
        Ok(count + 1)
    }

    fn find(&mut self, count_max: u64) -> Result<(HostCluster, u64)> {
        let entries = self.refcounts.geometry.block_entries();
        let count_max = usize::try_from(count_max.clamp(1, entries)).unwrap_or(1);
        let mut cluster = self.first_free;
        loop {
            let (index, entry) = self.refcounts.place(cluster);
            self.ensure_block(index)?;
            if let Some((free, count)) = self.refcounts.find_free(index, entry, count_max)? {
                let first = self.refcounts.first_of_block(index) + free as u64;
                self.first_free = first;
                return Ok((first, count as u64));
            }
            cluster = self.refcounts.first_of_block(index + 1);
            // Not searched again if the next block has to be read first.
            self.first_free = cluster;
        }
    }

    fn take(&mut self, first: HostCluster, count: u64) -> Result<Reserved> {
        let geometry = self.refcounts.geometry;
        let (offset, end) = (geometry.host_offset(first), geometry.host_offset(first + count));
        if self.protected.iter().any(|range| offset < range.end && range.start < end) {
            return Err(damaged("the place of a table has no references"));
        }
        for done in 0..count {
            if let Err(error) = self.refcounts.set_refcount(first + done, 1) {
                self.release(Reserved { offset, clusters: done, never_written: false });
                return Err(error);
            }
        }
        self.reserved_since_open.insert(first.run(count));
        if self.first_free == first {
            self.first_free = first + count;
        }
        let never_written = offset >= self.never_written_from;
        self.never_written_from = self.never_written_from.max(end);
        Ok(Reserved { offset, clusters: count, never_written })
    }

    fn refcount_with_block(&mut self, cluster: HostCluster) -> Result<u64> {
        let (index, _) = self.refcounts.place(cluster);
        self.ensure_block(index)?;
        self.refcounts.refcount(cluster)
    }

    /// Makes sure that there is a refcount block of this index. A new one lies in the first cluster
    /// that it counts, and so counts itself.
    fn ensure_block(&mut self, index: usize) -> Result<()> {
        if self.refcounts.has_block(index) {
            return Ok(());
        }
        let geometry = self.refcounts.geometry;
        let table_bytes = (index as u64 + 1) * 8;
        if table_bytes > REFCOUNT_TABLE_BYTES_MAX {
            let detail = "the file would become larger than the format allows";
            return Err(Error::new(ErrorKind::NoSpace, "grow", detail));
        }
        let cluster = self.refcounts.first_of_block(index);
        let offset = geometry.host_offset(cluster);
        if index == 0 {
            return Err(damaged("its first refcount block is missing"));
        }
        if self.protected.iter().any(|range| range.contains(&offset)) {
            return Err(damaged("the place of a table has no references"));
        }
        if offset < self.file_end {
            match &self.used_blocks {
                Some(used) if used.contains(&(index as u64)) => {
                    return Err(damaged("a refcount block is missing, though data needs it"));
                }
                Some(_) => {}
                None => {
                    self.wants_used_blocks = true;
                    return Err(damaged("a refcount block is missing"));
                }
            }
        }
        self.refcounts.add_block(index, offset)?;
        self.refcounts.set_refcount(cluster, 1)?;
        self.never_written_from = self.never_written_from.max(offset + geometry.cluster_size());
        let place = self.new_table_place.unwrap_or(self.table_place);
        if table_bytes > place.clusters * geometry.cluster_size()
            && let Err(error) = self.move_table(table_bytes)
        {
            self.refcounts.remove_block(index);
            return Err(error);
        }
        Ok(())
    }

    /// Reserves a place for a larger refcount table; the next flush writes it and switches over.
    fn move_table(&mut self, table_bytes: u64) -> Result<()> {
        let geometry = self.refcounts.geometry;
        let bytes = (table_bytes + table_bytes / 2).min(REFCOUNT_TABLE_BYTES_MAX);
        // This one would overlap with what the recursion below reserves: set it first.
        let unused = self
            .new_table_place
            .replace(TablePlace { clusters: u64::MAX >> 24, ..TablePlace::default() });
        let reserved = match self.reserve_exact(geometry.clusters_of(bytes)) {
            Ok(reserved) => reserved,
            Err(error) => {
                self.new_table_place = unused;
                return Err(error);
            }
        };
        // A place that was never used leaks: after a flush that failed half way the header may
        // point to it.
        self.new_table_place =
            Some(TablePlace { offset: reserved.offset, clusters: reserved.clusters });
        Ok(())
    }
}

pub(in crate::qcow2) fn damaged(what: &str) -> Error {
    let detail = format!("its metadata is damaged: {what}; check it with 'nbd-cli image check'");
    Error::new(ErrorKind::Corrupt, "change", detail)
}

/// The allocator that works by the refcounts to which the header points.
pub(in crate::qcow2) fn make_allocator(
    file: &Arc<dyn Storage>,
    header: &Header,
) -> Result<Allocator> {
    let geometry = header.geometry;
    let table_place = TablePlace {
        offset: header.refcount_table_offset,
        clusters: u64::from(header.refcount_table_clusters),
    };
    let table_bytes = table_place.clusters * geometry.cluster_size();
    let table = read_words(&**file, table_place.offset, (table_bytes / 8) as usize)?;
    let length = file.len().map_err(read_error)?;
    let refcounts = Refcounts::new(Arc::clone(file), geometry, table);
    let mut allocator = Allocator::new(refcounts, table_place, length);
    let l1_end = header.l1_offset.saturating_add(u64::from(header.l1_entries) * 8);
    let first_cluster = HostOffset::new(0)..HostOffset::new(geometry.cluster_size());
    let places = [first_cluster, header.l1_offset..l1_end, table_place.range(geometry)];
    allocator.protected = places.into();
    Ok(allocator)
}
