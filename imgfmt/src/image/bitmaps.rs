//! The dirty bitmaps of an image.

use std::path::{Path, PathBuf};

use super::Image;
use crate::backup::{Backup, Uuid};
use crate::bitmap::{BitmapChange, BitmapInfo, DirtyBits, DirtyExtent, Recording};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{Qcow2, no_bitmap};
use crate::sidecar::BitmapDurabilityStatus;
use crate::units::{GuestOffset, GuestRange};

impl Image {
    /// The bitmaps of the image itself, not of its backing files, in the order in which they are
    /// stored. Images that are not qcow2 have none. To know how many bytes are dirty all bits are
    /// read.
    pub fn bitmaps(&self) -> Vec<BitmapInfo> {
        self.qcow2().map(|image| image.bitmaps().list()).unwrap_or_default()
    }

    /// Why bitmaps that the image claims to have cannot be found, as a clause; `None` if all is
    /// well. The disk can be used all the same. Its first change drops them for good, and so does
    /// [`check_file`](Self::check_file) if it repairs.
    pub fn bitmap_damage(&self) -> Option<String> {
        self.qcow2().and_then(|image| image.bitmaps().damage())
    }

    /// The durability of the bitmaps of the image, and those recovered when it was opened. The first
    /// change creates the file that keeps their bits; a failure to create it is unknown before.
    pub fn bitmap_durability(&self) -> BitmapDurabilityStatus {
        self.qcow2().map(|image| image.bitmaps().durability_status()).unwrap_or_default()
    }

    /// As [`bitmap_durability`](Self::bitmap_durability), and if nothing has changed yet, tries to
    /// create the file that keeps the bits, and removes it again.
    pub fn probe_bitmap_durability(&self) -> BitmapDurabilityStatus {
        self.qcow2().map(|image| image.bitmaps().probe_durability()).unwrap_or_default()
    }

    /// Adds a bitmap in which nothing is dirty. `granularity` is how many bytes a bit stands for: a
    /// power of two from 512 to 2 GiB; usual is
    /// [`BITMAP_GRANULARITY_DEFAULT`](crate::BITMAP_GRANULARITY_DEFAULT).
    ///
    /// # Errors
    ///
    /// As [`bitmap_transaction`](Self::bitmap_transaction).
    pub fn add_bitmap(&self, name: &str, granularity: u64, recording: Recording) -> Result<()> {
        let name = name.to_owned();
        self.bitmap_transaction(&[BitmapChange::Add { name, granularity, recording }])
    }

    /// Removes a bitmap, whatever its state.
    ///
    /// # Errors
    ///
    /// As [`bitmap_transaction`](Self::bitmap_transaction).
    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        self.bitmap_transaction(&[BitmapChange::Remove { name: name.to_owned() }])
    }

    /// Makes several changes of the image's bitmaps at one instant, or none of them: every change of
    /// the disk lies wholly before that instant or wholly after it. Writes that come meanwhile
    /// wait. When it returns the changes are on disk.
    ///
    /// # Errors
    ///
    /// `NotFound` and `AlreadyExists` for names; `InvalidInput` for names, granularities and
    /// numbers of bitmaps that are not possible; `Corrupt` for steps that need bits which cannot be
    /// relied on; `Unsupported` for raw images and version 2 of qcow2; `ReadOnly`, `NoSpace`, `Io`.
    pub fn bitmap_transaction(&self, changes: &[BitmapChange]) -> Result<()> {
        self.check_change("change the bitmaps of", GuestOffset::new(0), 0)?;
        let Some(image) = self.qcow2() else {
            let detail = "a raw image cannot hold bitmaps; convert it to qcow2";
            let error = Error::new(ErrorKind::Unsupported, "change the bitmaps of", detail);
            return Err(self.name(error));
        };
        image.change_bitmaps(changes).map_err(|error| self.name(error))
    }

    /// Puts bits back that checkpoints have [frozen](BitmapChange::Freeze), where they and the bits of
    /// the bitmap can be relied on; returns the names of the bitmaps that have them back. Opening the
    /// image for writing has done so already: to be called after a repair. No checkpoint may be in
    /// progress.
    ///
    /// # Errors
    ///
    /// As [`bitmap_transaction`](Self::bitmap_transaction); nothing has changed then.
    pub fn thaw_bitmaps(&self) -> Result<Vec<String>> {
        self.check_change("change the bitmaps of", GuestOffset::new(0), 0)?;
        let thawed = self.qcow2().map_or(Ok(Vec::new()), Qcow2::thaw_bitmaps);
        thawed.map_err(|error| self.name(error))
    }

    /// What a bitmap says about the parts of a range, in order and without gaps, from its start on:
    /// at most `max_count` extents. It is empty only if the range is, or `max_count` is 0. The bitmap is
    /// looked for in the image and then in its backing files, from the top down. The part of the
    /// disk past the end of a shorter backing file is clean.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Corrupt` if the bitmap cannot be relied on; `OutOfBounds`.
    pub fn dirty_extents(
        &self,
        name: &str,
        range: GuestRange,
        max_count: usize,
    ) -> Result<Vec<DirtyExtent>> {
        let range = self.check("look for changes in", range.offset(), range.length())?;
        let layer = self.layer_with_bitmap(name)?;
        layer.bitmaps().dirty_extents(name, range, max_count).map_err(|error| self.name(error))
    }

    /// A copy of the bits of a bitmap, to be merged into one of another image. It is looked for as
    /// in [`dirty_extents`](Self::dirty_extents).
    ///
    /// # Errors
    ///
    /// As [`dirty_extents`](Self::dirty_extents).
    pub fn dirty_bits(&self, name: &str) -> Result<DirtyBits> {
        self.layer_with_bitmap(name)?.bitmaps().dirty_bits(name).map_err(|error| self.name(error))
    }

    /// Which disk this is: known since a bitmap was [frozen](BitmapChange::Freeze) for a backup for the
    /// first time.
    pub fn disk_id(&self) -> Option<Uuid> {
        self.qcow2().and_then(|image| image.bitmaps().disk_id())
    }

    /// What each layer of the image says about the backup that it is, the image itself first, with
    /// its file where that is known.
    pub fn backups_of_chain(&self) -> Vec<(Option<PathBuf>, Option<Backup>)> {
        let of_image = |image: &Qcow2| (image.path().map(Path::to_owned), image.backup());
        // A layer of another format cannot say.
        let layers = self.chain.qcow2_layers().map(|image| image.map_or((None, None), of_image));
        if self.qcow2().is_some() { layers.collect() } else { Vec::new() }
    }

    /// The files of the layers that say which backup they are in a form that cannot be read: it is
    /// damaged, or of a newer version. [`backups_of_chain`](Self::backups_of_chain) has nothing about
    /// them.
    pub fn unreadable_backups_of_chain(&self) -> Vec<Option<PathBuf>> {
        let layers = self.chain.qcow2_layers().flatten();
        let unreadable = layers.filter(|image| image.is_unreadable_backup());
        unreadable.map(|image| image.path().map(Path::to_owned)).collect()
    }

    /// The bitmaps of all layers that a name can mean, the image's own first, each name once.
    pub fn bitmaps_of_chain(&self) -> Vec<BitmapInfo> {
        let mut found: Vec<BitmapInfo> = Vec::new();
        for bitmap in self.chain.qcow2_layers().flatten().flat_map(|image| image.bitmaps().list()) {
            if !found.iter().any(|other| other.name == bitmap.name) {
                found.push(bitmap);
            }
        }
        found
    }

    /// All bitmaps of the one layer in which a name is found, as in
    /// [`dirty_extents`](Self::dirty_extents); none if it is not found.
    pub fn bitmaps_beside(&self, name: &str) -> Vec<BitmapInfo> {
        self.layer_with_bitmap(name).map(|layer| layer.bitmaps().list()).unwrap_or_default()
    }

    fn layer_with_bitmap(&self, name: &str) -> Result<&Qcow2> {
        if self.qcow2().is_none() {
            let detail =
                format!("a raw image has no bitmaps, so there is no '{}'", name.escape_debug());
            return Err(self.name(Error::new(
                ErrorKind::Unsupported,
                "look for a bitmap of",
                detail,
            )));
        }
        let mut layers = self.chain.qcow2_layers().flatten();
        let found = layers.find(|image| image.bitmaps().has(name));
        found.ok_or_else(|| self.name(no_bitmap(name)))
    }
}
