//! Rebuilding: a new refcount table with new blocks, in unused clusters.
//!
//! The new structures are written to clusters without references (entries that point past the end
//! of the file count as well) and synced. Then one write of the header switches over. If that is
//! interrupted, the old refcounts are valid or the new ones, and nothing else has changed.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::Plan;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::allocator::make_allocator;
use crate::qcow2::alloc::clusters::Clusters;
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::header::field;
use crate::qcow2::on_disk::refcount_entry::write_entry;
use crate::qcow2::on_disk::words::read_error;
use crate::storage::Durability;
use crate::units::HostOffset;

const TABLE_BYTES_MAX: u64 = 8 << 20;

/// The layout of the new structures, in clusters.
struct Layout {
    table: HostCluster,
    table_clusters: u64,
    /// The blocks by the number of their table entry.
    blocks: BTreeMap<u64, HostCluster>,
}

/// The part of the file from which clusters are taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    /// After the end of the file, which grows.
    AfterEnd,
    /// Within the file, if it cannot grow.
    Within,
}

/// New refcounts for an image.
pub(super) struct Rebuild<'a> {
    metadata: &'a MetadataFile,
    clusters: &'a Clusters,
    /// The geometry with the new width of refcounts.
    geometry: Geometry,
    plan: Plan,
}

impl<'a> Rebuild<'a> {
    pub(super) fn new(
        (metadata, clusters): (&'a MetadataFile, &'a Clusters),
        geometry: Geometry,
        mut plan: Plan,
    ) -> Self {
        // The old refcounts have no references any more; their places only must not be overwritten.
        for (first, last) in &plan.structure {
            plan.counts.subtract(*first, *last);
        }
        plan.structure = merged(plan.structure);
        plan.beyond = merged(plan.beyond);
        Self { metadata, clusters, geometry, plan }
    }

    /// Refuses a width of refcounts that is too small for the references of a cluster.
    pub(super) fn refuse_too_narrow(&self) -> Result<()> {
        let max = self.geometry.refcount_max();
        let counts = &self.plan.counts;
        if counts.used().any(|cluster| counts.get(cluster) > max) {
            let detail = format!(
                "a cluster has more references than refcounts of {} bits can hold; delete snapshots \
                 first, or choose more bits",
                self.geometry.refcount_bits()
            );
            return Err(Error::new(ErrorKind::Unsupported, "amend", detail));
        }
        Ok(())
    }

    /// Replaces the refcounts by new ones.
    pub(super) fn run(&self) -> Result<()> {
        let layout = self.new_structure()?;
        self.switch_to(&layout)
    }

    /// Writes new refcounts, to which nothing refers yet.
    fn new_structure(&self) -> Result<Layout> {
        let after_end = self.lay_out(Room::AfterEnd);
        let written = after_end.and_then(|layout| self.write_structure(&layout).map(|()| layout));
        match written {
            Ok(layout) => Ok(layout),
            Err(error) => {
                self.cut_back();
                // A device cannot grow, nor can a file on a full disk. References that were not
                // counted may be anywhere within.
                if error.kind() != ErrorKind::NoSpace || self.plan.is_incomplete {
                    return Err(error);
                }
                let Ok(layout) = self.lay_out(Room::Within) else { return Err(error) };
                self.write_structure(&layout)?;
                Ok(layout)
            }
        }
    }

    /// Truncates the file to its former length, so that the image is unchanged.
    fn cut_back(&self) {
        let length = self.plan.file_length;
        if self.metadata.file.len().is_ok_and(|now| now > length) {
            // If that fails, the part past the end is only unused.
            let _ = self.metadata.file.set_len(length);
        }
    }

    fn lay_out(&self, room: Room) -> Result<Layout> {
        let (geometry, plan) = (self.geometry, &self.plan);
        let entries = geometry.block_entries();
        let mut needed: BTreeSet<u64> =
            plan.counts.used().map(|at| at.number() / entries).collect();
        if plan.is_incomplete {
            let blocks = plan.file_end.number().div_ceil(entries);
            if blocks > TABLE_BYTES_MAX / 8 {
                return Err(too_large());
            }
            needed.extend(0..blocks);
        }
        loop {
            let table_bytes = needed.last().map_or(1, |last| last + 1).saturating_mul(8);
            if table_bytes > TABLE_BYTES_MAX {
                return Err(too_large());
            }
            let mut free = Free { plan, room, next: HostCluster::new(0) };
            if room == Room::AfterEnd {
                free.next = plan.file_end;
            }
            let table_clusters = geometry.clusters_of(table_bytes);
            let table = free.take_run(table_clusters)?;
            let mut blocks = BTreeMap::new();
            for index in &needed {
                blocks.insert(*index, free.take_run(1)?);
            }
            let taken = blocks.values().copied().chain(table.run(table_clusters));
            let counted_by: Vec<u64> = taken.map(|cluster| cluster.number() / entries).collect();
            let before = needed.len();
            needed.extend(counted_by);
            if needed.len() == before {
                return Ok(Layout { table, table_clusters, blocks });
            }
        }
    }

    fn write_structure(&self, layout: &Layout) -> Result<()> {
        let (geometry, plan) = (self.geometry, &self.plan);
        let entries = geometry.block_entries();
        let new_table = layout.table..layout.table + layout.table_clusters;
        let new_blocks: BTreeSet<HostCluster> = layout.blocks.values().copied().collect();
        let mut table = vec![0; (layout.table_clusters << geometry.cluster_bits) as usize];
        for (index, cluster) in &layout.blocks {
            let mut bytes = vec![0; geometry.cluster_size() as usize];
            let first = HostCluster::new(index * entries);
            plan.counts.for_each(first, first + entries, |at, count| {
                let is_new = new_table.contains(&at) || new_blocks.contains(&at);
                let is_kept = plan.is_incomplete && at < plan.file_end;
                let count = count.max(u64::from(is_new || is_kept)).min(geometry.refcount_max());
                if count > 0 {
                    let entry = (at - first) as usize;
                    write_entry(&mut bytes, entry, geometry.refcount_order, count);
                }
            });
            let offset = geometry.host_offset(*cluster);
            self.write_new_cluster(offset, &bytes)?;
            table[*index as usize * 8..][..8].copy_from_slice(&offset.bytes().to_be_bytes());
        }
        self.write_new_cluster(geometry.host_offset(layout.table), &table)?;
        self.metadata.sync()
    }

    fn write_new_cluster(&self, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        self.metadata.file.write_at(offset, bytes, Durability::Cached).map_err(|error| {
            let error = Error::from_io("rebuild the refcounts of", error).at(offset.bytes());
            self.metadata.named(error.explained("nothing else of the image was changed"))
        })
    }

    /// Switches the header, and the state in memory, to the new table and its width.
    fn switch_to(&self, layout: &Layout) -> Result<()> {
        let offset = self.geometry.host_offset(layout.table);
        let clusters = layout.table_clusters as u32;
        let order = self.geometry.refcount_order;
        let mut fields = [0; 12];
        fields[..8].copy_from_slice(&offset.bytes().to_be_bytes());
        fields[8..].copy_from_slice(&clusters.to_be_bytes());
        if order == self.metadata.header().geometry.refcount_order {
            self.metadata.write_header(field::REFCOUNT_TABLE_OFFSET, &fields)?;
        } else {
            // Both at once: these fields are in one sector.
            self.metadata.edit_header(|file, _| {
                let length = field::REFCOUNT_ORDER - field::REFCOUNT_TABLE_OFFSET;
                let mut between = vec![0; length as usize];
                let start = HostOffset::new(field::REFCOUNT_TABLE_OFFSET);
                file.read_exact_at(start, &mut between).map_err(read_error)?;
                between[..12].copy_from_slice(&fields);
                between.extend(order.to_be_bytes());
                self.metadata.write_header(field::REFCOUNT_TABLE_OFFSET, &between)
            })?;
            self.metadata.update_header(|header| header.geometry.refcount_order = order);
        }
        self.metadata.sync_header()?;
        self.metadata.update_header(|header| {
            header.refcount_table_offset = offset;
            header.refcount_table_clusters = clusters;
        });
        let allocator = make_allocator(&self.metadata.file, &self.metadata.header())?;
        *self.clusters.allocator()? = allocator;
        Ok(())
    }
}

/// Clusters without references, in order.
struct Free<'a> {
    plan: &'a Plan,
    room: Room,
    next: HostCluster,
}

impl Free<'_> {
    /// The first of `count` contiguous clusters.
    fn take_run(&mut self, count: u64) -> Result<HostCluster> {
        let mut first = self.next;
        let mut cluster = first;
        while cluster < first + count {
            if self.room == Room::Within && cluster >= self.plan.file_end {
                return Err(no_room());
            }
            if let Some(after) = self.occupied_up_to(cluster) {
                let next = after.number().checked_add(1).filter(|next| *next < 1 << 55);
                first = next.map(HostCluster::new).ok_or_else(no_room)?;
                cluster = first;
            } else {
                cluster += 1;
            }
        }
        self.next = cluster;
        Ok(first)
    }

    /// If this cluster has references, the last of the clusters after it that are known to have
    /// some too.
    fn occupied_up_to(&self, cluster: HostCluster) -> Option<HostCluster> {
        let within = |ranges: &[(HostCluster, HostCluster)]| {
            let number = ranges.partition_point(|(first, _)| *first <= cluster);
            let (_, last) = ranges.get(number.checked_sub(1)?)?;
            (*last >= cluster).then_some(*last)
        };
        if self.plan.counts.get(cluster) > 0 {
            return Some(cluster);
        }
        within(&self.plan.beyond).or_else(|| within(&self.plan.structure))
    }
}

/// Ranges in order, none of which touches another.
fn merged(mut ranges: Vec<(HostCluster, HostCluster)>) -> Vec<(HostCluster, HostCluster)> {
    ranges.sort_unstable();
    let mut merged: Vec<(HostCluster, HostCluster)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= *end => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn no_room() -> Error {
    let detail = "the file has no space for new refcounts, and cannot grow";
    Error::new(ErrorKind::NoSpace, "rebuild the refcounts of", detail)
}

fn too_large() -> Error {
    let detail = "the file is larger than its refcounts can describe";
    Error::new(ErrorKind::NoSpace, "rebuild the refcounts of", detail)
}
