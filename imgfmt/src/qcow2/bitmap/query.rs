//! Queries: the list of bitmaps, and their bits.

use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use super::directory::{Entry, flag};
use super::error::{no_bitmap, not_reliable};
use super::frozen;
use super::store::Bitmaps;
use crate::bitmap::{Bitmap, BitmapInfo, BitmapState, Bits, Condition, DirtyBits, DirtyExtent};
use crate::error::Result;
use crate::qcow2::info::BitmapEntry;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::units::{GuestRange, HostOffset};

impl Bitmaps {
    /// Information about the bitmaps of this layer.
    pub(crate) fn list(&self) -> Vec<BitmapInfo> {
        let state = self.tracker.read();
        let all = frozen::by_name(state.bitmaps().iter());
        let incomplete = |bitmap: &Bitmap<Entry>| {
            let (frozen, problem) = self.frozen_part(&all, bitmap)?;
            Some(BitmapState::Incomplete { frozen, problem })
        };
        let info = |bitmap: &Bitmap<Entry>| BitmapInfo {
            name: bitmap.name.clone(),
            granularity: 1 << bitmap.granularity_bits,
            recording: bitmap.recording,
            is_in_use: bitmap.in_use.load(Acquire),
            began_after: self.began_after(&bitmap.name),
            state: match (&bitmap.condition, self.ready_bits(bitmap)) {
                (Condition::Inconsistent(reason), _) => {
                    BitmapState::Inconsistent { reason: reason.clone() }
                }
                (_, Err(reason)) => BitmapState::Damaged { reason },
                (_, Ok(bits)) => incomplete(bitmap)
                    .unwrap_or(BitmapState::Consistent { dirty_bytes: bits.dirty_bytes() }),
            },
        };
        state.bitmaps().iter().map(info).collect()
    }

    /// The bitmaps as the image records them.
    pub(crate) fn entries(&self) -> Vec<BitmapEntry> {
        let state = self.tracker.read();
        let all = frozen::by_name(state.bitmaps().iter());
        let entry = |bitmap: &Bitmap<Entry>| BitmapEntry {
            name: bitmap.name.clone(),
            granularity: 1 << bitmap.granularity_bits,
            recording: bitmap.recording,
            is_in_use: bitmap.in_use.load(Acquire),
            frozen: frozen::frozen_bits(&all, bitmap).map(|frozen| frozen.name.clone()),
        };
        state.bitmaps().iter().map(entry).collect()
    }

    /// Why the image's directory of bitmaps cannot be read, as a clause.
    pub(crate) fn damage(&self) -> Option<String> {
        self.disk.lock().damage.clone()
    }

    /// Whether this layer has a bitmap of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tracker.read().bitmaps().iter().any(|bitmap| bitmap.name == name)
    }

    /// The dirty and the clean parts of a range according to a bitmap of this layer.
    pub(crate) fn dirty_extents(
        &self,
        name: &str,
        range: GuestRange,
        max_count: usize,
    ) -> Result<Vec<DirtyExtent>> {
        self.with_bits(name, |bits| bits.extents(range, max_count))
    }

    /// The bits of a bitmap of this layer as they are now.
    pub(crate) fn dirty_bits(&self, name: &str) -> Result<DirtyBits> {
        self.with_bits(name, |bits| DirtyBits(Arc::new(bits.resized(bits.size()))))
    }

    fn with_bits<T>(&self, name: &str, ask: impl FnOnce(&Bits) -> T) -> Result<T> {
        // Held while bits are read: clearing them takes the exclusive state.
        let state = self.tracker.read();
        let bitmap = find(state.bitmaps(), name)?;
        self.refuse_incomplete(state.bitmaps(), bitmap)?;
        let bits = self.ready_bits(bitmap).map_err(|detail| not_reliable(name, &detail))?;
        Ok(ask(&bits))
    }

    /// Whether the image has no bitmaps, not even unreadable ones.
    pub(in crate::qcow2) fn are_none(&self) -> bool {
        let disk = self.disk.lock();
        disk.directory.is_none() && disk.damage.is_none()
    }

    /// The places of bitmaps in the file (offset, length), and descriptions of damage.
    ///
    /// Does not lock the tracker: an allocation, which may count all references, can happen while
    /// the bitmaps are changed or a write is recorded.
    pub(in crate::qcow2) fn places(&self) -> (Vec<(HostOffset, u64)>, Vec<String>) {
        let geometry = self.geometry();
        let disk = self.disk.lock();
        let mut damages: Vec<String> = disk.damage.iter().cloned().collect();
        let mut places: Vec<(HostOffset, u64)> =
            disk.directory.iter().map(|place| (place.offset, place.length)).collect();
        let entries = disk.entries.clone();
        drop(disk);
        for entry in &entries {
            match self.entry_clusters(entry) {
                Ok(clusters) => {
                    let size = geometry.cluster_size();
                    places.extend(clusters.iter().map(|at| (geometry.host_offset(*at), size)));
                }
                Err(detail) => {
                    let name = String::from_utf8_lossy(&entry.name);
                    damages.push(format!("the bitmap '{}': {detail}", name.escape_debug()));
                }
            }
        }
        (places, damages)
    }

    /// The clusters of a bitmap that the directory lists. An error is the reason, as a clause, why
    /// it cannot be used; QEMU would not open such an image.
    pub(super) fn entry_clusters(&self, entry: &Entry) -> Result<Vec<HostCluster>, String> {
        if let Some((detail, _)) = &entry.damage {
            return Err(detail.clone());
        }
        let table = entry.table;
        let bytes = Bits::bytes_for(self.size, entry.granularity_bits);
        let needed = bytes.div_ceil(self.geometry().cluster_size());
        if entry.flags & flag::IN_USE == 0 && u64::from(table.entries) != needed {
            return Err(format!("its table has {} entries, not {needed}", table.entries));
        }
        self.table_clusters(table)
    }
}

fn find<'a>(bitmaps: &'a [Bitmap<Entry>], name: &str) -> Result<&'a Bitmap<Entry>> {
    let found = bitmaps.iter().find(|bitmap| bitmap.name == name);
    found.ok_or_else(|| no_bitmap(name))
}
