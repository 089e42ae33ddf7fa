//! The plan of a write to one cluster: its destination, and the old content that is copied with it.

use crate::error::Result;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::map::table::Table;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::l2::Cluster;
use crate::units::{GuestOffset, GuestRange, span};

/// Old bytes around the new ones up to this size are written together with them.
pub(super) const MERGE_BYTES: u64 = 128 << 10;

/// The plan of a write to one cluster.
#[derive(Debug)]
pub(in crate::qcow2) struct Plan {
    pub(in crate::qcow2) guest_start: GuestOffset,
    /// The part of the cluster that is written, as offsets within it.
    pub(in crate::qcow2) from: u64,
    pub(in crate::qcow2) to: u64,
    pub(in crate::qcow2) old: Cluster,
    pub(in crate::qcow2) new: Cluster,
    pub(in crate::qcow2) fill: Vec<Fill>,
    /// The new bytes and old ones on both sides, if there are any to write with them.
    pub(in crate::qcow2) merged: Option<Merged>,
    /// Whether the new place reads as zero because the file was never written there.
    pub(in crate::qcow2) never_written: bool,
}

/// A part of a new cluster that is not written but must have the old content.
#[derive(Debug)]
pub(in crate::qcow2) struct Fill {
    /// Offsets within the cluster.
    pub(in crate::qcow2) start: u64,
    pub(in crate::qcow2) end: u64,
    pub(in crate::qcow2) old: Old,
}

/// The content of a [`Fill`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) enum Old {
    /// Zeroes.
    Zero,
    /// Bytes that are in the plan's [`Merged`].
    Merged,
    /// Too much to keep in memory, or not examined yet.
    Large,
}

/// New bytes with old ones around them, to be written at once.
#[derive(Debug)]
pub(in crate::qcow2) struct Merged {
    /// The offset of `bytes` within the cluster.
    pub(super) start: u64,
    pub(super) bytes: Vec<u8>,
}

impl MappingTables {
    /// Decides for each cluster where the bytes of a range go. The range is within one table of a
    /// disk of `size` bytes.
    pub(super) fn plan(&self, table: &Table, range: GuestRange, size: u64) -> Result<Vec<Plan>> {
        let geometry = self.geometry();
        let mut plans = Vec::new();
        let mut position = range.offset();
        while position < range.end() {
            let guest_start = geometry.cluster_start(position);
            let stop = range.end().min(guest_start + geometry.cluster_size());
            self.refuse_bad(table, position)?;
            let old = self.decode_to_change(table, position)?;
            // A raw data file must not become longer than the disk.
            let limit = match self.format.has_data_file {
                true => (GuestOffset::new(size) - guest_start).min(geometry.cluster_size()),
                false => geometry.cluster_size(),
            };
            let part = (position - guest_start, stop - guest_start);
            plans.push(Plan::of_cluster(geometry, guest_start, part, old, limit));
            position = stop;
        }
        Ok(plans)
    }
}

impl Plan {
    /// The part of the disk that is written.
    pub(super) fn range(&self) -> GuestRange {
        span(self.guest_start + self.from, self.guest_start + self.to)
    }

    /// Decides for one cluster where the bytes from `from` to `to` go and what must be copied with
    /// them. A new place is reserved later: `host` is `None` until then. Bytes from `limit` on are
    /// not data.
    fn of_cluster(
        geometry: Geometry,
        guest_start: GuestOffset,
        (from, to): (u64, u64),
        old: Cluster,
        limit: u64,
    ) -> Self {
        let touched = geometry.subcluster_mask(from, to);
        let stays = old.copied && old.host.is_some() && old.compressed.is_none();
        let mut allocated = old.allocated | touched;
        if old.compressed.is_some() {
            allocated = geometry.all_subclusters();
        }
        let present = if stays { old.allocated } else { 0 };
        let new = Cluster {
            host: if stays { old.host } else { None },
            copied: true,
            compressed: None,
            allocated,
            zero: old.zero & !allocated,
        };
        let mut fill: Vec<Fill> = Vec::new();
        for subcluster in 0..geometry.subclusters() {
            if (allocated & !present) >> subcluster & 1 == 0 {
                continue;
            }
            let start = u64::from(subcluster) * geometry.subcluster_size();
            let end = start + geometry.subcluster_size();
            for (start, end) in [(start, end.min(from)), (start.max(to), end.min(limit))] {
                match fill.last_mut() {
                    _ if start >= end => {}
                    Some(last) if last.end == start => last.end = end,
                    _ => fill.push(Fill { start, end, old: Old::Large }),
                }
            }
        }
        Self { guest_start, from, to, old, new, fill, merged: None, never_written: false }
    }
}

impl Merged {
    /// New bytes with zeroes around them.
    pub(super) fn new(plan: &Plan, (start, end): (u64, u64), new: &[u8]) -> Self {
        let mut merged = Self { start, bytes: vec![0; (end - start) as usize] };
        merged.part_mut(plan.from, plan.to).copy_from_slice(new);
        merged
    }

    pub(super) fn part(&self, from: u64, to: u64) -> &[u8] {
        &self.bytes[(from - self.start) as usize..(to - self.start) as usize]
    }

    pub(super) fn part_mut(&mut self, from: u64, to: u64) -> &mut [u8] {
        &mut self.bytes[(from - self.start) as usize..(to - self.start) as usize]
    }
}

impl Fill {
    pub(super) fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Whether this is written together with the new bytes.
    pub(super) fn is_merged(&self, plan: &Plan) -> bool {
        (self.end == plan.from || self.start == plan.to) && self.length() <= MERGE_BYTES
    }
}
