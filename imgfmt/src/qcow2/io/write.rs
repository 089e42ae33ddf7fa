//! Writing: in place where the cluster has one reference, otherwise reserve, write, commit.

use std::sync::Arc;

use crate::error::Result;
use crate::qcow2::alloc::allocator::Reserved;
use crate::qcow2::image::Qcow2;
use crate::qcow2::io::plan::Plan;
use crate::qcow2::map::lookup::Lookup;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::map::tables::Change;
use crate::storage::TryWrite;
use crate::units::{GuestOffset, GuestRange, HostOffset, span};
use crate::write_map::WriteMap;

/// Length in bytes of one step of an allocating write, but at least one cluster. The stripes are
/// held for one step at a time.
const STEP_BYTES: u64 = 2 << 20;

impl Qcow2 {
    pub(in crate::qcow2) fn write_range(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        self.flusher().relieve_pressure()?;
        if self.write_in_place(offset, data, Lookup::MayRead)? {
            return Ok(());
        }
        let step = step_bytes(&self.mapping);
        let mut rest = data;
        let mut position = offset;
        while !rest.is_empty() {
            // Steps end at multiples of their size, so each is within one slice of an L2 table.
            let length = (step - position.bytes() % step).min(rest.len() as u64);
            let (part, behind) = rest.split_at(length as usize);
            self.write_step(position, part, Lookup::MayRead)?;
            rest = behind;
            position += length;
        }
        Ok(())
    }

    /// Writes if that needs no metadata from the file and no old data that is not in memory;
    /// returns whether it did.
    pub(in crate::qcow2) fn try_write_range(
        &self,
        offset: GuestOffset,
        data: &[u8],
    ) -> Result<bool> {
        // Where encrypted data allocates, all of a cluster is written.
        if self.data.is_encrypted() {
            return self.try_write_encrypted(offset, data);
        }
        if self.write_in_place(offset, data, Lookup::CachedOnly)? {
            return Ok(true);
        }
        let step = step_bytes(&self.mapping);
        let end = offset.bytes() + data.len() as u64;
        if offset.bytes() / step != (end - 1) / step || self.flusher().is_under_pressure() {
            return Ok(false);
        }
        self.write_step(offset, data, Lookup::CachedOnly)
    }

    /// Writes all of `data` in place if every cluster allows it; otherwise writes nothing.
    pub(in crate::qcow2) fn write_in_place(
        &self,
        start: GuestOffset,
        data: &[u8],
        lookup: Lookup,
    ) -> Result<bool> {
        // While it is held, the clusters found below are not reused.
        let _lease = self.clusters.lease_to_write()?;
        let mut segments = Vec::new();
        if !self.mapping.find_in_place(range_of(start, data), lookup, &mut segments)? {
            return Ok(false);
        }
        for (host, from, to) in segments {
            self.data.write(host, &data[from..to], start + from as u64)?;
        }
        Ok(true)
    }

    /// Writes encrypted data in one place in place, if that waits for no other write of a sector.
    fn try_write_encrypted(&self, start: GuestOffset, data: &[u8]) -> Result<bool> {
        let _lease = self.clusters.lease_to_write()?;
        let (range, mut segments) = (range_of(start, data), Vec::new());
        if !self.mapping.find_in_place(range, Lookup::CachedOnly, &mut segments)? {
            return Ok(false);
        }
        let [(host, ..)] = segments[..] else { return Ok(false) };
        Ok(self.data.try_write(host, data, start)? == TryWrite::Complete)
    }

    /// Finds the place where all of a range can be written, if it is one place that metadata in
    /// memory shows.
    pub(in crate::qcow2) fn map_in_place(&self, range: GuestRange) -> Result<Option<WriteMap>> {
        // Recorded before any lookup, like every change.
        let Ok(recorded) = self.bitmaps.try_before_change_elsewhere(range) else {
            return Ok(None);
        };
        let lease = self.clusters.lease_to_write()?;
        let mut segments = Vec::new();
        if !self.mapping.find_in_place(range, Lookup::CachedOnly, &mut segments)? {
            return Ok(None);
        }
        let [(host, ..)] = segments[..] else { return Ok(None) };
        let Some(map) = WriteMap::new(self.data.storage()?, host, range.length()) else {
            return Ok(None);
        };
        let map = map.with(recorded, lease).reporting_to(Arc::clone(&self.metadata) as _);
        // Asked after the look-up: what was found is on disk then.
        Ok(Some(if self.flusher().is_all_durable() { map.durable_alone() } else { map }))
    }

    /// Writes data that is within one slice of an L2 table, for clusters of all kinds. Returns
    /// false, with nothing changed, if `lookup` allows only metadata in memory and that does not
    /// suffice.
    fn write_step(&self, start: GuestOffset, data: &[u8], lookup: Lookup) -> Result<bool> {
        let (first, count) = self.geometry().guest_clusters(range_of(start, data));
        let Some(_stripes) = self.clusters.lock(first, count, lookup) else { return Ok(false) };
        self.write_locked(start, data, lookup)
    }

    /// As [`write_step`](Self::write_step), for a caller that holds the stripes of all clusters.
    pub(super) fn write_locked(
        &self,
        start: GuestOffset,
        data: &[u8],
        lookup: Lookup,
    ) -> Result<bool> {
        let geometry = self.geometry();
        let range = range_of(start, data);
        let _lease = self.clusters.lease_to_write()?;
        let table = match lookup {
            Lookup::MayRead => Some(self.mapping.table_for_write(start, self)?),
            Lookup::CachedOnly => self.mapping.own_table_in_memory(start)?,
        };
        let Some(table) = table else { return Ok(false) };
        let mut plans = self.mapping.plan(&table, range, self.size)?;
        for plan in &mut plans {
            let new = part_of(data, start, plan.range());
            if !self.gather_old(plan, new, lookup)? {
                return Ok(false);
            }
        }
        let mut reserved = Vec::new();
        let result = match self.reserve_for(&mut plans, &mut reserved, lookup) {
            Ok(true) => {
                for new in reserved.iter().filter(|new| new.never_written) {
                    self.data.extend_ahead(new.offset + new.clusters * geometry.cluster_size());
                }
                self.write_plans(&plans, start, data).map(|()| true)
            }
            other => other,
        };
        if !matches!(result, Ok(true)) {
            if result.is_err() {
                self.clusters.punch(&reserved);
            }
            self.clusters.release(&reserved);
            return result;
        }
        let changed = plans.iter().filter(|plan| plan.new != plan.old);
        let mut freed = Vec::new();
        let changes: Vec<Change> = changed
            .inspect(|plan| freed.extend(self.mapping.references(plan.old, plan.new.host, false)))
            .map(|plan| Change { guest: plan.guest_start, cluster: plan.new })
            .collect();
        if !changes.is_empty() {
            self.mapping.commit(&table, &changes, &freed)?;
        }
        Ok(true)
    }

    /// Reserves a new cluster for every plan that needs one, contiguous if possible. Returns false
    /// if that needs metadata that is not in memory and may not be read.
    fn reserve_for(
        &self,
        plans: &mut [Plan],
        reserved: &mut Vec<Reserved>,
        lookup: Lookup,
    ) -> Result<bool> {
        let cluster_size = self.geometry().cluster_size();
        let mut wanted = plans.iter().filter(|plan| plan.new.host.is_none()).count() as u64;
        let mut at_hand = Reserved::nothing();
        for plan in plans.iter_mut().filter(|plan| plan.new.host.is_none()) {
            if self.mapping.format.has_data_file {
                // Offsets in a data file are those of the disk.
                plan.new.host = Some(HostOffset::new(plan.guest_start.bytes()));
                continue;
            }
            if at_hand.clusters == 0 {
                let Some(found) = self.clusters.reserve_if(wanted, lookup, self)? else {
                    return Ok(false);
                };
                at_hand = found;
                reserved.push(at_hand);
            }
            plan.new.host = Some(at_hand.offset);
            // What was never written decrypts to noise.
            plan.never_written = at_hand.never_written && !self.data.is_encrypted();
            at_hand.offset += cluster_size;
            at_hand.clusters -= 1;
            wanted -= 1;
        }
        Ok(true)
    }

    fn write_plans(&self, plans: &[Plan], start: GuestOffset, data: &[u8]) -> Result<()> {
        let write = |host, range: GuestRange| {
            self.data.write(host, part_of(data, start, range), range.offset())
        };
        let mut waiting: Option<(HostOffset, GuestRange)> = None;
        for plan in plans {
            let host = plan.new.host.unwrap_or_default();
            let range = plan.range();
            if let Some((first, begun)) = &mut waiting {
                if plan.fill.is_empty() && *first + begun.length() == host + plan.from {
                    *begun = span(begun.offset(), range.end());
                    continue;
                }
                write(*first, *begun)?;
                waiting = None;
            }
            if plan.fill.is_empty() {
                waiting = Some((host + plan.from, range));
            } else {
                self.write_filled(plan, host, part_of(data, start, range))?;
            }
        }
        waiting.map_or(Ok(()), |(host, range)| write(host, range))
    }
}

/// The range of the disk for `data` at `start`.
fn range_of(start: GuestOffset, data: &[u8]) -> GuestRange {
    span(start, start + data.len() as u64)
}

/// The part of `data`, which begins at `start` of the disk, for a range within it.
pub(super) fn part_of(data: &[u8], start: GuestOffset, range: GuestRange) -> &[u8] {
    &data[(range.offset() - start) as usize..(range.end() - start) as usize]
}

/// See [`STEP_BYTES`]. A step is within one slice of an L2 table.
pub(super) fn step_bytes(mapping: &MappingTables) -> u64 {
    STEP_BYTES.max(mapping.geometry().cluster_size()).min(mapping.slices.coverage())
}
