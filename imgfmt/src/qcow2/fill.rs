//! What comes along when a part of a cluster is written to a new place: the old content around it.

use super::Qcow2;
use super::map::Lookup;
use super::write::Plan;
use crate::error::Result;
use crate::storage::{Speed, TryRead, ZeroMode, is_zero};
use crate::units::{GuestOffset, HostOffset};

/// Old bytes around the new ones up to this size are written together with them.
const MERGE_BYTES: u64 = 128 << 10;

/// Old bytes that are not written with new ones are copied in pieces of this size.
const COPY_BYTES: u64 = 1 << 20;

/// A part of a new cluster that is not written but must hold what the old one showed.
#[derive(Debug)]
pub(super) struct Fill {
    /// Offsets within the cluster.
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) old: Old,
}

/// What a [`Fill`] holds.
#[derive(Debug)]
pub(super) enum Old {
    /// Zeroes.
    Zero,
    /// These bytes.
    Bytes(Vec<u8>),
    /// Too much to keep in memory, or not looked at yet.
    Large,
}

impl Fill {
    fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it is written together with the new bytes.
    fn is_merged(&self, plan: &Plan) -> bool {
        (self.end == plan.from || self.start == plan.to) && self.length() <= MERGE_BYTES
    }
}

impl Qcow2 {
    /// Finds out what the old content is. Returns false if that takes reading from a disk and only
    /// what is in memory may be used. The caller holds the stripes of the plans' clusters.
    pub(super) fn gather_old(&self, plans: &mut [Plan], lookup: Lookup) -> Result<bool> {
        for plan in plans {
            let mut fills = std::mem::take(&mut plan.fill);
            for fill in &mut fills {
                if self.is_mapped_zero(plan, fill) {
                    fill.old = Old::Zero;
                } else if fill.is_merged(plan) {
                    let Some(old) = self.read_old(plan, fill, lookup)? else { return Ok(false) };
                    fill.old = old;
                } else if lookup == Lookup::CachedOnly {
                    return Ok(false);
                }
            }
            plan.fill = fills;
        }
        Ok(true)
    }

    /// Whether the mapping alone says that the old content is zero.
    fn is_mapped_zero(&self, plan: &Plan, fill: &Fill) -> bool {
        let mask = self.geometry().subcluster_mask(fill.start, fill.end);
        if plan.old.compressed.is_some() || plan.old.allocated & mask != 0 {
            return false;
        }
        let backing_size = self.backing.as_ref().map_or(0, |backing| backing.size);
        plan.old.zero & mask == mask || plan.guest_start + fill.start >= backing_size
    }

    fn read_old(&self, plan: &Plan, fill: &Fill, lookup: Lookup) -> Result<Option<Old>> {
        let mut bytes = vec![0; fill.length() as usize];
        let offset = GuestOffset::new(plan.guest_start + fill.start);
        match lookup {
            Lookup::MayRead => self.read_range(offset, &mut bytes)?,
            Lookup::CachedOnly => {
                if self.try_read_range(offset, &mut bytes)? == TryRead::WouldBlock {
                    return Ok(None);
                }
            }
        }
        Ok(Some(if is_zero(&bytes) { Old::Zero } else { Old::Bytes(bytes) }))
    }

    /// Writes new bytes with the old ones around them.
    pub(super) fn write_filled(&self, plan: &Plan, host: u64, data: &[u8]) -> Result<()> {
        let (mut before, mut behind) = (None, None);
        for fill in &plan.fill {
            match &fill.old {
                // Where the file has never been there are zeroes already.
                Old::Zero if plan.is_virgin => {}
                _ if !fill.is_merged(plan) => self.copy_old(plan, host, fill)?,
                _ if fill.end == plan.from => before = Some(fill),
                _ => behind = Some(fill),
            }
        }
        if before.is_none() && behind.is_none() {
            return self.write_data(host + plan.from, data, plan.guest_start + plan.from);
        }
        let mut merged = Vec::with_capacity(self.geometry().cluster_size() as usize);
        let append = |fill: Option<&Fill>, merged: &mut Vec<u8>| match fill {
            Some(Fill { old: Old::Bytes(bytes), .. }) => merged.extend_from_slice(bytes),
            Some(fill) => merged.resize(merged.len() + fill.length() as usize, 0),
            None => {}
        };
        append(before, &mut merged);
        merged.extend_from_slice(data);
        append(behind, &mut merged);
        let first = before.map_or(plan.from, |fill| fill.start);
        self.write_data(host + first, &merged, plan.guest_start + first)
    }

    /// Copies a part of the old content into the new cluster.
    fn copy_old(&self, plan: &Plan, host: u64, fill: &Fill) -> Result<()> {
        let guest = plan.guest_start + fill.start;
        if matches!(fill.old, Old::Zero) {
            return self.write_zeroes_as_data(host + fill.start, fill.length(), guest);
        }
        let mut buffer = vec![0; fill.length().min(COPY_BYTES) as usize];
        let mut position = fill.start;
        while position < fill.end {
            let part = &mut buffer[..(fill.end - position).min(COPY_BYTES) as usize];
            self.read_range(GuestOffset::new(plan.guest_start + position), part)?;
            let length = part.len() as u64;
            if !is_zero(part) {
                self.write_data(host + position, part, guest)?;
            } else if !plan.is_virgin {
                self.write_zeroes_as_data(host + position, length, guest)?;
            }
            position += length;
        }
        Ok(())
    }

    fn write_zeroes_as_data(&self, host: u64, length: u64, guest: u64) -> Result<()> {
        self.data_will_grow(host + length, guest)?;
        self.data
            .write_zeroes(HostOffset::new(host), length, ZeroMode::KeepAllocated, Speed::Any)
            .map_err(|error| self.io("write to", error, GuestOffset::new(guest)))
    }
}
