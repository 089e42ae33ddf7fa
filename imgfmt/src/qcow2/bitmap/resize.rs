//! Changes the size of bitmaps with the size of the disk.
//!
//! The size and the location of the directory are in different sectors of the header, so they
//! cannot change together. Therefore all bitmaps are marked as in use before the size changes,
//! which permits tables of any size, and are stored again afterwards.

use std::sync::Arc;
use std::sync::atomic::Ordering::Release;

use super::directory::{Entry, flag};
use super::plan::Planned;
use super::store::{Bitmaps, ImageServices, unusable};
use crate::bitmap::{Bitmap, Bits, Condition, Recording};
use crate::error::Result;
use crate::units::{GuestOffset, GuestRange};

impl Bitmaps {
    /// Loads all bitmaps and marks them as in use, before the size of the disk changes.
    pub(in crate::qcow2) fn before_resize(&self, image: &dyn ImageServices) -> Result<()> {
        let mut exclusive = self.tracker.exclusive();
        let mut bitmaps: Vec<Bitmap<Entry>> = exclusive.bitmaps().to_vec();
        let mut disk = self.disk.lock();
        self.settle_directory(&mut disk)?;
        if disk.directory.is_none() {
            return Ok(());
        }
        self.give_up_foreign_directory(image, &mut disk.directory, &bitmaps)?;
        let since = self.metadata.failed_syncs();
        for (bitmap, flags_place) in bitmaps.iter_mut().zip(&disk.flags_places) {
            if let Err(detail) = self.ready_bits(bitmap) {
                bitmap.condition = unusable(bitmap, detail);
            }
            if let Some(place) = disk.directory {
                let flags = bitmap.stored.flags | flag::IN_USE;
                self.metadata.write(place.offset + *flags_place, &flags.to_be_bytes())?;
            }
        }
        self.metadata.sync()?;
        self.metadata.refuse_lost_since(since)?;
        bitmaps.iter().for_each(|bitmap| bitmap.in_use.store(true, Release));
        disk.note_in_use(&bitmaps);
        drop(disk);
        let is_marked = self.is_marked(&bitmaps);
        exclusive.replace(bitmaps, is_marked);
        Ok(())
    }

    /// Records a size that the disk will have when a snapshot replaces its content: the added part
    /// is then not known to be clean.
    pub(in crate::qcow2) fn note_size(&mut self, size: u64) {
        // Treat it as an earlier part of the disk: its bits are set when the size changes.
        self.size_peak = self.size_peak.max(size);
    }

    /// Resizes all bitmaps in memory to the present size of the disk, even if that cannot be
    /// stored. An added part is clean, except where it had been cut off before.
    pub(in crate::qcow2) fn resize(&mut self, size: u64) {
        let old_size = std::mem::replace(&mut self.size, size);
        let peak = self.size_peak;
        self.size_peak = peak.max(size);
        let (start, end) = (GuestOffset::new(old_size), GuestOffset::new(peak.min(size)));
        let cut_before = GuestRange::between(start, end).unwrap_or_default();
        let mut exclusive = self.tracker.exclusive();
        let mut bitmaps: Vec<Bitmap<Entry>> = exclusive.bitmaps().to_vec();
        for bitmap in bitmaps.iter_mut().filter(|bitmap| bitmap.condition == Condition::Ready) {
            let Some(old) = bitmap.bits.take() else { continue };
            let resized = Bits::resized(&old, size);
            if bitmap.recording == Recording::Enabled {
                resized.set_range(cut_before);
            }
            bitmap.bits = Arc::new(resized).into();
        }
        // The sidecar has the old size: the next change creates another one.
        exclusive.replace(bitmaps, false);
    }

    /// Stores all bitmaps after a change of the disk's size.
    pub(in crate::qcow2) fn store_resized(&self, image: &dyn ImageServices) -> Result<()> {
        let mut exclusive = self.tracker.exclusive();
        if exclusive.bitmaps().is_empty() {
            return Ok(());
        }
        let mut plan: Vec<Planned> = exclusive.bitmaps().iter().map(Planned::unchanged).collect();
        for planned in &mut plan {
            planned.must_store = planned.bitmap.condition == Condition::Ready;
        }
        self.carry_out(image, &mut exclusive, plan)
    }
}
