//! Storing bitmaps in the clusters that they have, where there is no space for new ones.
//!
//! Meanwhile they are marked as in use, and remain so if that fails or is interrupted.

use std::sync::atomic::Ordering::Release;

use super::directory::{Entry, OFFSET_MASK, Table, flag};
use super::freeze::planned_by_name;
use super::plan::Planned;
use super::store::Bitmaps;
use super::table::ALL_ONES;
use crate::bitmap::{Bits, ExclusiveState};
use crate::error::Result;
use crate::qcow2::on_disk::words::words_to_bytes;
use crate::units::HostOffset;

impl Bitmaps {
    /// Stores the bitmaps that changed in the clusters that they have; returns whether that was
    /// possible. The changes that they record need not be on disk.
    ///
    /// Dirty bits without a cluster are stored as a cluster of set bits, which takes no space. But
    /// where a sidecar has the bits, only these are stored.
    pub(in crate::qcow2) fn store_in_place(&self) -> Result<bool> {
        self.overwrite(&mut self.tracker.exclusive())
    }

    /// As [`store_in_place`](Self::store_in_place).
    pub(super) fn overwrite(&self, exclusive: &mut ExclusiveState<'_, Entry>) -> Result<bool> {
        let plan = Planned::to_store(exclusive.bitmaps());
        let may_set_more = !self.is_kept_beside();
        let mut disk = self.disk.lock();
        let (Some(place), false) = (disk.directory, disk.is_doubtful) else { return Ok(false) };
        let since = self.metadata.failed_syncs();
        let all = planned_by_name(&plan);
        for planned in plan.iter().filter(|planned| planned.must_store) {
            let bits = self.bits_to_store(&all, planned)?;
            if !self.overwrite_bits(&bits, planned.bitmap.stored.table, may_set_more)? {
                return Ok(false);
            }
        }
        self.metadata.sync()?;
        self.metadata.refuse_lost_since(since)?;
        let mut bitmaps = exclusive.bitmaps().to_vec();
        // If some flags are cleared and that fails, the next change sets them again.
        exclusive.replace(bitmaps.clone(), false);
        let stored = |index: &usize| plan[*index].must_store;
        for index in (0..plan.len()).filter(stored) {
            let flags = &mut bitmaps[index].stored.flags;
            *flags &= !flag::IN_USE;
            let flags_place = place.offset + disk.flags_places[index];
            self.metadata.write(flags_place, &flags.to_be_bytes())?;
        }
        self.metadata.sync()?;
        self.metadata.refuse_lost_since(since)?;
        for index in (0..plan.len()).filter(stored) {
            bitmaps[index].in_use.store(false, Release);
            disk.entries[index].flags &= !flag::IN_USE;
        }
        exclusive.replace(bitmaps, false);
        Ok(true)
    }

    /// Writes bits to the clusters that a table has; returns whether all of them could be stored.
    fn overwrite_bits(&self, bits: &Bits, table: Table, may_set_more: bool) -> Result<bool> {
        let cluster = self.geometry().cluster_size();
        let length = Bits::bytes_for(bits.size(), bits.granularity_bits());
        let Ok(clusters) = self.table_clusters(table) else { return Ok(false) };
        let Ok(mut words) = self.table_words(table) else { return Ok(false) };
        let is_alone = {
            let ownership = self.ownership.lock();
            clusters.iter().all(|cluster| ownership.alone.contains(cluster))
        };
        if !is_alone || words.len() as u64 != length.div_ceil(cluster) {
            return Ok(false);
        }
        for (index, word) in words.iter_mut().enumerate() {
            let start = index as u64 * cluster;
            let mut content = vec![0; (length - start).min(cluster) as usize];
            bits.store(start, &mut content);
            if *word & OFFSET_MASK != 0 {
                self.metadata.write(HostOffset::new(*word), &content)?;
            } else if content.iter().all(|byte| *byte == 0) {
                *word = 0;
            } else if may_set_more || content.iter().all(|byte| *byte == 0xff) {
                *word = ALL_ONES;
            } else {
                return Ok(false);
            }
        }
        self.metadata.write(table.offset, &words_to_bytes(&words))?;
        Ok(true)
    }
}
