//! Removes damaged bitmaps, as a part of a repair.

use super::directory::Entry;
use super::frozen;
use super::store::{Bitmaps, ImageServices};
use crate::bitmap::{Bitmap, BitmapChange};
use crate::error::Result;
use crate::qcow2::metadata::header_edit::{change_autoclear, remove_extension};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::autoclear;

impl Bitmaps {
    /// Removes the bitmaps whose clusters are unknown, as the last step of a repair.
    pub(in crate::qcow2) fn drop_damaged(&self, image: &dyn ImageServices) -> Result<()> {
        let mut disk = self.disk.lock();
        if disk.damage.is_some() {
            self.metadata.edit_header(|file, cluster_size| {
                change_autoclear(file, 0, autoclear::BITMAPS)?;
                // QEMU refuses an extension that it cannot read, whatever the bit says.
                remove_extension(file, cluster_size, extension::BITMAPS)
            })?;
            disk.damage = None;
        }
        let entries = disk.entries.clone();
        drop(disk);
        let state = self.tracker.read();
        let all = frozen::by_name(state.bitmaps().iter());
        let without = |bitmap: &Bitmap<Entry>| {
            let name = bitmap.name.clone();
            match frozen::owner(&all, &name) {
                // Without it the other bitmap would look complete, so everything is marked as dirty
                // there.
                Some(_) => BitmapChange::Repair { name },
                None => BitmapChange::Remove { name },
            }
        };
        let damaged = state.bitmaps().iter().zip(&entries);
        let damaged = damaged.filter(|(_, entry)| self.entry_clusters(entry).is_err());
        let changes: Vec<_> = damaged.map(|(bitmap, _)| without(bitmap)).collect();
        drop(state);
        match changes.is_empty() {
            true => Ok(()),
            false => self.transaction(image, &changes),
        }
    }
}
