//! What is to be done for one cluster, and what of its old content comes along.

use crate::qcow2::on_disk::l2::Cluster;

/// Old bytes around the new ones up to this size are written together with them.
pub(super) const MERGE_BYTES: u64 = 128 << 10;

/// What is to be done for one cluster.
#[derive(Debug)]
pub(in crate::qcow2) struct Plan {
    pub(in crate::qcow2) guest_start: u64,
    /// The part of the cluster that is written, as offsets within it.
    pub(in crate::qcow2) from: u64,
    pub(in crate::qcow2) to: u64,
    pub(in crate::qcow2) old: Cluster,
    pub(in crate::qcow2) new: Cluster,
    pub(in crate::qcow2) fill: Vec<Fill>,
    /// The new bytes and old ones on both sides, if there are any to write along.
    pub(in crate::qcow2) merged: Option<Merged>,
    /// The new place reads as zero: the file has never been there.
    pub(in crate::qcow2) never_written: bool,
}

/// A part of a new cluster that is not written but must hold what the old one showed.
#[derive(Debug)]
pub(in crate::qcow2) struct Fill {
    /// Offsets within the cluster.
    pub(in crate::qcow2) start: u64,
    pub(in crate::qcow2) end: u64,
    pub(in crate::qcow2) old: Old,
}

/// What a [`Fill`] holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) enum Old {
    /// Zeroes.
    Zero,
    /// Bytes that are in the plan's [`Merged`].
    Merged,
    /// Too much to keep in memory, or not looked at yet.
    Large,
}

/// New bytes with old ones around them, to be written at once.
#[derive(Debug)]
pub(in crate::qcow2) struct Merged {
    /// Where `bytes` begins, as an offset within the cluster.
    pub(super) start: u64,
    pub(super) bytes: Vec<u8>,
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

    /// Whether it is written together with the new bytes.
    pub(super) fn is_merged(&self, plan: &Plan) -> bool {
        (self.end == plan.from || self.start == plan.to) && self.length() <= MERGE_BYTES
    }
}
