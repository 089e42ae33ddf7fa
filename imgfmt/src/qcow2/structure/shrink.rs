//! Shrinks the disk, in one step.
//!
//! A new L1 table without the end of the disk, and a copy of the L2 table that contains the new
//! end, are written to new places. One write of the header then changes the size and the place of
//! the L1 table, which share a sector. Only then are the clusters of the old end freed. So a crash
//! leaves the old disk or the new one, and at worst leaked clusters. Where the new L1 table is the
//! beginning of the old one, its length in the header changes and not its place: a disk that was
//! made larger and then finds no space becomes smaller again without any.

use crate::error::Result;
use crate::qcow2::alloc::allocator::{Freed, Reserved};
use crate::qcow2::image::Qcow2;
use crate::qcow2::on_disk::l2::{COPIED, table_of};
use crate::units::{GuestOffset, Offset as _};

/// Where the L1 table is after the change.
enum Place {
    /// Where it was, with its first entries.
    Old {
        entries: usize,
    },
    New(Reserved),
}

/// How many entries of the old L1 table are the new one, of which `whole` are needed; `None` if it
/// differs in one of them.
fn entries_kept(old: &[u64], new: &[u64], whole: usize) -> Option<usize> {
    match (old == new, whole) {
        (true, _) => Some(old.len()),
        (false, 0) => None,
        (false, _) => (old.get(..whole)? == new.get(..whole)?).then_some(whole),
    }
}

impl Qcow2 {
    /// Makes the disk end at `size` bytes, and returns its old L1 table. Everything is flushed.
    pub(in crate::qcow2) fn switch_to_smaller(&mut self, size: u64) -> Result<Vec<u64>> {
        let geometry = self.geometry();
        let old = self.mapping.l1_words();
        let end = GuestOffset::new(size).round_up(geometry.cluster_size());
        self.mapping.refuse_bad_behind(end)?;
        let mut l1 = old.clone();
        let whole = geometry.l1_entries_for(end.bytes()) as usize;
        l1.iter_mut().skip(whole).for_each(|entry| *entry = 0);
        let cut = self.mapping.cut_table(end, self)?;
        if let (Some(offset), Some(entry)) = (cut, l1.get_mut(geometry.l1_index(end) as usize)) {
            *entry = offset.bytes() | COPIED;
        }
        let place = match entries_kept(&old, &l1, whole) {
            Some(entries) => Ok(Place::Old { entries }),
            None => self.write_l1(&l1).map(Place::New),
        };
        let switched = place.and_then(|place| {
            // A part that is cut off and added again is clean, although its content is another one.
            self.bitmaps.forget_lineage()?;
            match place {
                Place::Old { entries } => self.shorten_l1(entries, size),
                Place::New(reserved) => self.switch_l1(reserved, l1, size),
            }
        });
        if let (Err(_), Some(offset), true) = (&switched, cut, self.size != size) {
            // No entry refers to the copy.
            self.clusters.free_place(offset, geometry.cluster_size())?;
        }
        self.mapping.forget_tables(self.size);
        switched.map(|()| old)
    }

    /// Switches to the first `entries` of the L1 table, and to a size of the disk.
    fn shorten_l1(&mut self, entries: usize, size: u64) -> Result<()> {
        let geometry = self.geometry();
        let offset = self.metadata.header().l1_offset;
        let switched = self.write_disk_fields(size, entries as u32, offset);
        if self.size != size {
            return switched;
        }
        // Even if the sync failed, the file names fewer entries now. The clusters of the others are
        // freed only if the disk certainly does not need them.
        let mut l1 = self.mapping.l1_words();
        let (old_bytes, bytes) = (l1.len() as u64 * 8, entries as u64 * 8);
        l1.truncate(entries);
        self.mapping.replace_l1(l1);
        switched?;
        let old_place = offset..offset + old_bytes;
        let protected = &mut self.clusters.allocator()?.protected;
        protected.iter_mut().filter(|place| **place == old_place).for_each(|place| {
            place.end = offset + bytes;
        });
        let kept = geometry.clusters_touched(offset, bytes).count();
        let rest = geometry.clusters_touched(offset, old_bytes).skip(kept);
        self.clusters.free(rest.map(|cluster| Freed { cluster, punch: false }));
        Ok(())
    }

    /// Frees everything after `size` that an L1 table refers to. The header on disk no longer names
    /// that table.
    pub(in crate::qcow2) fn free_behind(&self, size: u64, old: &[u64]) -> Result<()> {
        let geometry = self.geometry();
        let end = GuestOffset::new(size).round_up(geometry.cluster_size());
        let now = self.mapping.l1_words();
        for (index, entry) in old.iter().enumerate().skip(geometry.l1_index(end) as usize) {
            let Some(offset) = table_of(*entry) else { continue };
            if now.get(index).is_some_and(|now| table_of(*now) == Some(offset)) {
                continue;
            }
            let words = self.mapping.words_behind(end, index as u64, offset)?;
            let mut freed = vec![Freed { cluster: geometry.host_cluster(offset), punch: false }];
            for entry in words.chunks_exact(geometry.entry_words()) {
                let bitmap = entry.get(1).copied().unwrap_or(0);
                let cluster = self.mapping.format.decode(entry[0], bitmap);
                let cluster =
                    cluster.map_err(|detail| self.metadata.corrupt(detail, offset.bytes()))?;
                freed.extend(self.mapping.references(cluster, None, true));
            }
            self.clusters.free(freed);
            self.flusher().relieve_pressure()?;
        }
        self.flusher().flush()
    }
}
