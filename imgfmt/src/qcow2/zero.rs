//! Zeroes and discards: changes of the mapping that move no data.

use super::Qcow2;
use super::alloc::Freed;
use super::l2::Cluster;
use super::map::{Lookup, span};
use super::tables::Change;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Speed, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// What becomes of clusters that lie wholly in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Erase {
    /// They must read as zero.
    Zero(ZeroMode),
    /// Their content is of no interest.
    Discard,
}

impl Qcow2 {
    pub(super) fn zero_range(&self, range: GuestRange, mode: ZeroMode, speed: Speed) -> Result<()> {
        self.relieve_pressure()?;
        let unit = self.geometry().subcluster_size();
        let (start, end) = (range.offset().bytes(), range.end().bytes());
        // The end of the disk may lie within a cluster: what is behind it is nobody's.
        let inner_end =
            if end == self.size { end.next_multiple_of(unit) } else { end / unit * unit };
        let inner_start = start.next_multiple_of(unit);
        let can_map = self.can_map_zeroes();
        let edges = match can_map && inner_start < inner_end {
            true => [(start, inner_start), (inner_end.min(end), end)],
            false => [(start, end), (end, end)],
        };
        if speed == Speed::FastOnly {
            for (start, end) in edges {
                if start < end && !self.is_known_zero(start, end)? {
                    return Err(not_fast());
                }
            }
        }
        if can_map && inner_start < inner_end {
            self.erase(inner_start, inner_end, Erase::Zero(mode))?;
        }
        for (start, end) in edges {
            self.write_zero_data(start, end)?;
        }
        Ok(())
    }

    pub(super) fn discard_range(&self, range: GuestRange) -> Result<()> {
        self.relieve_pressure()?;
        // Without the zero flag a discarded cluster would show the backing file's content.
        if !self.can_map_zeroes() {
            return Ok(());
        }
        let unit = self.geometry().subcluster_size();
        let (start, end) = (range.offset().bytes(), range.end().bytes());
        let end = if end == self.size { end.next_multiple_of(unit) } else { end / unit * unit };
        let start = start.next_multiple_of(unit);
        if start < end { self.erase(start, end, Erase::Discard) } else { Ok(()) }
    }

    /// Whether a cluster can be made to read as zero by its entry alone.
    fn can_map_zeroes(&self) -> bool {
        self.header.version >= 3 || self.backing.is_none()
    }

    fn write_zero_data(&self, start: u64, end: u64) -> Result<()> {
        let zeroes = vec![0; (end - start).min(1 << 20) as usize];
        let mut position = start;
        while position < end {
            let length = (end - position).min(1 << 20);
            if !self.is_known_zero(position, position + length)? {
                self.write_range(GuestOffset::new(position), &zeroes[..length as usize])?;
            }
            position += length;
        }
        Ok(())
    }

    /// Erases a range of whole subclusters, table by table.
    fn erase(&self, start: u64, end: u64, what: Erase) -> Result<()> {
        let coverage = self.geometry().l2_coverage();
        let mut position = start;
        while position < end {
            let stop = end.min((position / coverage + 1).saturating_mul(coverage));
            self.relieve_pressure()?;
            let left_over = self.erase_in_table(position, stop, what)?;
            if matches!(what, Erase::Zero(_)) {
                for (start, end) in left_over {
                    self.write_zero_data(start, end)?;
                }
            }
            position = stop;
        }
        Ok(())
    }

    /// Returns the parts that the mapping alone cannot erase: a part of a compressed cluster.
    fn erase_in_table(&self, start: u64, end: u64, what: Erase) -> Result<Vec<(u64, u64)>> {
        let writer = self.writer()?;
        let geometry = self.geometry();
        let l1_index = geometry.l1_index(start);
        let first = start >> geometry.cluster_bits;
        let count = ((end - 1) >> geometry.cluster_bits) - first + 1;
        let _stripes = writer.lock_clusters(first, count, Lookup::MayRead);
        if self.backing.is_none() && matches!(self.table(l1_index, Lookup::MayRead)?, Some(None)) {
            return Ok(Vec::new()); // Nothing there: it reads as zero already.
        }
        let table = self.table_for_write(l1_index)?;
        let (mut changes, mut freed): (Vec<Change>, Vec<Freed>) = (Vec::new(), Vec::new());
        let mut left_over = Vec::new();
        let content = table.read();
        let mut position = start;
        while position < end {
            let guest_start = geometry.cluster_start(position);
            let stop = end.min(guest_start + geometry.cluster_size());
            self.refuse_bad(&table, &content.words, position)?;
            let old = self.decode(&content.words, position);
            let old = old.map_err(|error| self.note_damage(error))?;
            let mask = geometry.subcluster_mask(position - guest_start, stop - guest_start);
            if old.compressed.is_some() && mask != geometry.all_subclusters() {
                left_over.push((position, stop));
            } else if let Some(new) = self.erased(old, mask, what) {
                let punch = what != Erase::Zero(ZeroMode::KeepAllocated);
                freed.extend(self.references(old, new.host, punch));
                changes.push(Change { guest: guest_start, cluster: new });
            }
            position = stop;
        }
        drop(content);
        if !changes.is_empty() {
            self.commit(&table, &changes, &freed)?;
            self.erase_data_file(start, end)?;
        }
        Ok(left_over)
    }

    /// What becomes of a cluster when some of its subclusters are erased; `None` if nothing does.
    fn erased(&self, old: Cluster, mask: u32, what: Erase) -> Option<Cluster> {
        let all = self.geometry().all_subclusters();
        let is_empty = old.host.is_none() && old.compressed.is_none() && old.zero == 0;
        if is_empty && self.backing.is_none() {
            return None;
        }
        if old.zero & mask == mask && (old.host.is_none() || mask != all || what != Erase::Discard)
        {
            return None;
        }
        if self.header.version < 3 {
            // No zero flag, and no backing file: an entry of nothing reads as zero.
            return (!is_empty).then(Cluster::default);
        }
        let zero = old.zero | mask;
        if old.compressed.is_some() {
            return Some(Cluster { zero: all, ..Cluster::default() });
        }
        let allocated = old.allocated & !mask;
        let keeps_host = self.format.has_data_file
            || allocated != 0
            || what == Erase::Zero(ZeroMode::KeepAllocated) && old.copied;
        let host = if keeps_host { old.host } else { None };
        Some(Cluster {
            host,
            copied: old.copied && host.is_some(),
            compressed: None,
            allocated,
            zero,
        })
    }

    /// A raw data file must read as the disk does.
    fn erase_data_file(&self, start: u64, end: u64) -> Result<()> {
        if !self.format.has_data_file {
            return Ok(());
        }
        let length =
            self.data.len().map_err(|e| self.io("write to", e, GuestOffset::new(start)))?;
        let range = span(start.min(length), end.min(length));
        let offset = HostOffset::new(range.offset().bytes());
        match range.is_empty() {
            true => Ok(()),
            false => self
                .data
                .write_zeroes(offset, range.length(), ZeroMode::MayUnmap, Speed::Any)
                .map_err(|error| self.io("write to", error, range.offset())),
        }
    }
}

fn not_fast() -> Error {
    let detail = "parts of the range can only be zeroed by writing; allow the slow way, or align \
                  the range to clusters";
    Error::new(ErrorKind::NotFast, "write zeroes to", detail)
}
