//! Copy on write: when a part of a cluster is written to a new place, the old content around it is
//! copied.

use crate::error::Result;
use crate::mapping::Holes;
use crate::qcow2::image::Qcow2;
use crate::qcow2::io::plan::{Fill, Merged, Old, Plan};
use crate::qcow2::map::lookup::Lookup;
use crate::read::{read_at, try_read_at};
use crate::storage::TryRead;
use crate::units::HostOffset;
use crate::zero::is_zero;

/// Up to this many new bytes, one read instead of two covers the old content on both sides.
const READ_OVER_BYTES: usize = 16 << 10;

/// Old bytes that are not written with new ones are copied in pieces of this size, in bytes.
const COPY_BYTES: u64 = 1 << 20;

impl Qcow2 {
    /// Finds the old content around `new`, which is the plan's part of the data. Returns false if
    /// that needs a read from a disk and `lookup` forbids it. The caller holds the stripe of the
    /// plan's cluster.
    pub(in crate::qcow2) fn gather_old(
        &self,
        plan: &mut Plan,
        new: &[u8],
        lookup: Lookup,
    ) -> Result<bool> {
        let mut fills = std::mem::take(&mut plan.fill);
        for fill in &mut fills {
            if self.is_mapped_zero(plan, fill) {
                fill.old = Old::Zero;
            } else if fill.is_merged(plan) {
                fill.old = Old::Merged;
            } else if lookup == Lookup::CachedOnly {
                return Ok(false);
            }
        }
        let is_complete = !fills.iter().any(|fill| fill.old == Old::Merged)
            || self.merge(plan, &mut fills, new, lookup)?;
        plan.fill = fills;
        Ok(is_complete)
    }

    /// Whether the old content is zero according to the mapping.
    fn is_mapped_zero(&self, plan: &Plan, fill: &Fill) -> bool {
        let mask = self.geometry().subcluster_mask(fill.start, fill.end);
        if plan.old.compressed.is_some() || plan.old.allocated & mask != 0 {
            return false;
        }
        let backing_size = self.backing.size();
        plan.old.zero & mask == mask || (plan.guest_start + fill.start).bytes() >= backing_size
    }

    /// Reads the old bytes that are written together with new ones.
    fn merge(
        &self,
        plan: &mut Plan,
        fills: &mut [Fill],
        new: &[u8],
        lookup: Lookup,
    ) -> Result<bool> {
        let (start, end) = span_with(plan, fills.iter().filter(|fill| fill.is_merged(plan)));
        let mut merged = Merged { start, bytes: vec![0; (end - start) as usize] };
        let old = |fill: &&Fill| fill.old == Old::Merged;
        if fills.iter().filter(old).count() > 1 && new.len() <= READ_OVER_BYTES {
            // The bytes between are read as well: one call is cheaper than two.
            if !self.read_old(plan, &mut merged, start, end, lookup)? {
                return Ok(false);
            }
        } else {
            for fill in fills.iter().filter(old) {
                if !self.read_old(plan, &mut merged, fill.start, fill.end, lookup)? {
                    return Ok(false);
                }
            }
        }
        merged.part_mut(plan.from, plan.to).copy_from_slice(new);
        for fill in fills.iter_mut().filter(|fill| fill.old == Old::Merged) {
            if is_zero(merged.part(fill.start, fill.end)) {
                fill.old = Old::Zero;
            }
        }
        plan.merged = Some(merged);
        Ok(true)
    }

    fn read_old(
        &self,
        plan: &Plan,
        merged: &mut Merged,
        from: u64,
        to: u64,
        lookup: Lookup,
    ) -> Result<bool> {
        let offset = plan.guest_start + from;
        let bytes = merged.part_mut(from, to);
        match lookup {
            Lookup::MayRead => read_at(self, offset, bytes).map(|()| true),
            Lookup::CachedOnly => {
                Ok(try_read_at(self, offset, bytes, Holes::AsData)? == TryRead::Complete)
            }
        }
    }

    /// Writes new bytes with the old ones around them.
    pub(in crate::qcow2) fn write_filled(
        &self,
        plan: &Plan,
        host: HostOffset,
        data: &[u8],
    ) -> Result<()> {
        // A never written part of the file reads as zero already.
        let missing = || plan.fill.iter().filter(|it| it.old != Old::Zero || !plan.never_written);
        for fill in missing().filter(|fill| !fill.is_merged(plan)) {
            self.copy_old(plan, host, fill)?;
        }
        let (start, end) = span_with(plan, missing().filter(|fill| fill.is_merged(plan)));
        if (start, end) == (plan.from, plan.to) {
            return self.data.write(host + start, data, plan.guest_start + start);
        }
        let zeroes;
        let merged = match &plan.merged {
            Some(merged) => merged,
            None => {
                zeroes = Merged::new(plan, (start, end), data);
                &zeroes
            }
        };
        self.data.write(host + start, merged.part(start, end), plan.guest_start + start)
    }

    /// Copies a part of the old content into the new cluster.
    fn copy_old(&self, plan: &Plan, host: HostOffset, fill: &Fill) -> Result<()> {
        let guest = plan.guest_start + fill.start;
        if fill.old == Old::Zero {
            return self.data.write_zeroes(host + fill.start, fill.length(), guest);
        }
        let mut buffer = vec![0; fill.length().min(COPY_BYTES) as usize];
        let mut position = fill.start;
        while position < fill.end {
            let part = &mut buffer[..(fill.end - position).min(COPY_BYTES) as usize];
            read_at(self, plan.guest_start + position, part)?;
            let length = part.len() as u64;
            if !is_zero(part) {
                self.data.write(host + position, part, guest)?;
            } else if !plan.never_written {
                self.data.write_zeroes(host + position, length, guest)?;
            }
            position += length;
        }
        Ok(())
    }
}

/// The start and the end of a plan's new bytes together with `fills`, which touch them; offsets
/// within the cluster.
fn span_with<'a>(plan: &Plan, fills: impl Iterator<Item = &'a Fill>) -> (u64, u64) {
    fills
        .fold((plan.from, plan.to), |(start, end), fill| (start.min(fill.start), end.max(fill.end)))
}
