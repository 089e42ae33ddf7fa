//! Changes the size of bitmaps with the size of the disk.
//!
//! The size and the location of the directory are in different sectors of the header, so they
//! cannot change together. Therefore all bitmaps are marked as in use before the size changes,
//! which permits tables of any size. What is stored afterwards is written before, so that a full
//! disk is noticed before the size changes.

use std::sync::Arc;
use std::sync::atomic::Ordering::Release;

use super::commit::Prepared;
use super::directory::{Entry, flag};
use super::plan::Planned;
use super::store::{Bitmaps, ImageServices, unusable};
use crate::bitmap::{Bitmap, Bits, Condition, Recording};
use crate::error::Result;
use crate::units::{GuestOffset, GuestRange};

impl Bitmaps {
    /// Takes the space for the bitmaps of a disk of another size, and writes them there. The disk
    /// and its bitmaps are not changed before [`finish_resize`](Self::finish_resize). `changed` is
    /// the part of the resized disk whose content will be another one.
    pub(in crate::qcow2) fn prepare_resize(
        &self,
        image: &dyn ImageServices,
        size: u64,
        changed: GuestRange,
    ) -> Result<Option<Prepared>> {
        let exclusive = self.tracker.exclusive();
        if exclusive.bitmaps().is_empty() || size == self.size {
            return Ok(None);
        }
        let mut plan: Vec<Planned> = exclusive.bitmaps().iter().map(Planned::unchanged).collect();
        for planned in &mut plan {
            let bitmap = &planned.bitmap;
            match self.ready_bits(bitmap) {
                Ok(bits) => {
                    let resized = self.resized(bitmap, &bits, size);
                    if bitmap.recording == Recording::Enabled {
                        resized.set_range(changed);
                    }
                    planned.content = Some(Arc::new(resized));
                    planned.must_store = true;
                }
                // Its table will not fit the disk.
                Err(_) => bitmap.in_use.store(true, Release),
            }
        }
        self.prepare(image, plan).map(Some)
    }

    /// Switches to the prepared bitmaps if the size was `changed`, and gives up their space
    /// otherwise.
    pub(in crate::qcow2) fn finish_resize<T>(
        &self,
        image: &dyn ImageServices,
        prepared: Option<Prepared>,
        changed: Result<T>,
    ) -> Result<T> {
        let Some(prepared) = prepared else { return changed };
        match changed {
            Ok(changed) => {
                let mut exclusive = self.tracker.exclusive();
                self.carry_out_prepared(image, &mut exclusive, prepared).map(|()| changed)
            }
            Err(error) => {
                self.clusters.release(&prepared.reserved);
                Err(error)
            }
        }
    }

    /// The bits of a bitmap for a disk of another size. An added part is clean, except where it had
    /// been cut off before.
    fn resized(&self, bitmap: &Bitmap<Entry>, bits: &Bits, size: u64) -> Bits {
        let (start, end) =
            (GuestOffset::new(self.size), GuestOffset::new(self.size_peak.min(size)));
        let resized = bits.resized(size);
        if bitmap.recording == Recording::Enabled {
            resized.set_range(GuestRange::between(start, end).unwrap_or_default());
        }
        resized
    }

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
    /// stored.
    pub(in crate::qcow2) fn resize(&mut self, size: u64) {
        let mut exclusive = self.tracker.exclusive();
        let mut bitmaps: Vec<Bitmap<Entry>> = exclusive.bitmaps().to_vec();
        for bitmap in bitmaps.iter_mut().filter(|bitmap| bitmap.condition == Condition::Ready) {
            let Some(old) = bitmap.bits.take() else { continue };
            bitmap.bits = Arc::new(self.resized(bitmap, &old, size)).into();
        }
        // The sidecar has the old size: the next change creates another one.
        exclusive.replace(bitmaps, false);
        drop(exclusive);
        self.size = size;
        self.size_peak = self.size_peak.max(size);
    }
}
