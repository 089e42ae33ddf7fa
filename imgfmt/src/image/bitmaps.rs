//! The dirty bitmaps of an image.

use std::path::{Path, PathBuf};

use super::Image;
use crate::backup::{Backup, ContentMask, Uuid};
use crate::bitmap::{BitmapChange, BitmapInfo, DirtyBits, DirtyExtent, Recording};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{Qcow2, no_bitmap};
use crate::sidecar::BitmapDurabilityStatus;
use crate::units::{GuestOffset, GuestRange};

impl Image {
    /// Returns the bitmaps of the image itself, not of its backing files, in the order in which
    /// they are stored. Images that are not qcow2 have none. Blocks: all bits are read, to count
    /// the dirty bytes.
    pub fn bitmaps(&self) -> Vec<BitmapInfo> {
        self.qcow2().map(|image| image.bitmaps().list()).unwrap_or_default()
    }

    /// Returns the reason why the image's directory of bitmaps cannot be read, as a clause; `None`
    /// if it can. The disk can be used nevertheless. The first change of the disk removes the
    /// bitmaps permanently, and so does a repair by [`check_file`](Self::check_file).
    pub fn bitmap_damage(&self) -> Option<String> {
        self.qcow2().and_then(|image| image.bitmaps().damage())
    }

    /// Returns the durability of the image's bitmaps, and which of them were recovered when it was
    /// opened. The first change of the disk creates the file that keeps their bits; until then, it
    /// is unknown whether that will succeed.
    pub fn bitmap_durability(&self) -> BitmapDurabilityStatus {
        self.qcow2().map(|image| image.bitmaps().durability_status()).unwrap_or_default()
    }

    /// Like [`bitmap_durability`](Self::bitmap_durability). If nothing has changed yet, it also
    /// tries to create the file that keeps the bits, and removes it again.
    pub fn probe_bitmap_durability(&self) -> BitmapDurabilityStatus {
        self.qcow2().map(|image| image.bitmaps().probe_durability()).unwrap_or_default()
    }

    /// Adds an empty bitmap. `granularity` is the number of bytes per bit: a power of two from 512
    /// to 2 GiB, usually [`BITMAP_GRANULARITY_DEFAULT`](crate::BITMAP_GRANULARITY_DEFAULT).
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

    /// Makes several changes of the image's bitmaps at one instant, or none of them: every change
    /// of the disk is completely before or completely after that instant. Writes wait meanwhile.
    /// When it returns, the changes are durable.
    ///
    /// # Errors
    ///
    /// `NotFound` and `AlreadyExists` for names; `InvalidInput` for impossible names, granularities
    /// and numbers of bitmaps; `Corrupt` for steps that need unreliable bits; `Unsupported` for raw
    /// images and version 2 of qcow2; `ReadOnly`, `NoSpace`, `Io`.
    pub fn bitmap_transaction(&self, changes: &[BitmapChange]) -> Result<()> {
        self.check_change("change the bitmaps of", GuestOffset::new(0), 0)?;
        let Some(image) = self.qcow2() else {
            let detail = "only qcow2 images can hold bitmaps; convert it to qcow2";
            let error = Error::new(ErrorKind::Unsupported, "change the bitmaps of", detail);
            return Err(self.name(error));
        };
        image.change_bitmaps(changes).map_err(|error| self.name(error))
    }

    /// Merges bits that checkpoints have [frozen](BitmapChange::Freeze) back, where they and the
    /// bits of the bitmap are reliable. Returns the names of these bitmaps. Opening an image for
    /// writing does the same, so this is needed only after a repair. No checkpoint may be in
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

    /// Returns the dirty and the clean parts of a range according to a bitmap, in order and without
    /// gaps, from its start on: at most `max_count` extents. The result is empty only if the range
    /// is, or `max_count` is 0. The bitmap is looked up in the image and then in its backing files,
    /// from the top down. The part of the disk past the end of a shorter backing file is clean.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Corrupt` if the bitmap is unreliable; `OutOfBounds`.
    pub fn dirty_extents(
        &self,
        name: &str,
        range: GuestRange,
        max_count: usize,
    ) -> Result<Vec<DirtyExtent>> {
        let range = self.check("look for changes in", range.offset(), range.length())?;
        self.in_layer_with_bitmap(name, |layer| {
            layer.bitmaps().dirty_extents(name, range, max_count).map_err(|error| self.name(error))
        })
    }

    /// Returns a copy of the bits of a bitmap, to be merged into a bitmap of another image. The
    /// name is looked up as in [`dirty_extents`](Self::dirty_extents).
    ///
    /// # Errors
    ///
    /// As [`dirty_extents`](Self::dirty_extents).
    pub fn dirty_bits(&self, name: &str) -> Result<DirtyBits> {
        self.in_layer_with_bitmap(name, |layer| {
            layer.bitmaps().dirty_bits(name).map_err(|error| self.name(error))
        })
    }

    /// Returns the identity of the disk. It has one once a bitmap has been
    /// [frozen](BitmapChange::Freeze) for a backup.
    pub fn disk_id(&self) -> Option<Uuid> {
        self.qcow2().and_then(|image| image.bitmaps().disk_id())
    }

    /// Returns for each layer its file, if known, and the backup whose identity it records, if it
    /// does. The image itself is first.
    pub fn backups_of_chain(&self) -> Vec<(Option<PathBuf>, Option<Backup>)> {
        let of_image = |image: &Qcow2| (image.path().map(Path::to_owned), image.backup());
        // A layer of another format records none.
        let layers = self.chain.layers();
        let images = self.chain.qcow2_layers(&layers);
        let images = images.map(|image| image.map_or((None, None), of_image));
        if self.qcow2().is_some() { images.collect() } else { Vec::new() }
    }

    /// Returns what hides the sum of a backup in the header of this image; it hides nothing if the
    /// image is not encrypted. Apply it to the sum before the image is [sealed](Self::seal_backup);
    /// [`backups_of_chain`](Self::backups_of_chain) shows the sum again.
    ///
    /// # Errors
    ///
    /// `KeyRequired` if the image was opened without its key.
    pub fn sum_mask(&self, backup: Uuid) -> Result<ContentMask> {
        let mask = self.qcow2().map(|image| image.sum_mask(backup));
        mask.unwrap_or(Ok(ContentMask::none())).map_err(|error| self.name(error))
    }

    /// Returns the files of the layers whose record of a backup cannot be read: it is damaged, or
    /// of a newer version. [`backups_of_chain`](Self::backups_of_chain) has `None` for them.
    pub fn unreadable_backups_of_chain(&self) -> Vec<Option<PathBuf>> {
        let layers = self.chain.layers();
        let images = self.chain.qcow2_layers(&layers).flatten();
        let unreadable = images.filter(|image| image.is_unreadable_backup());
        unreadable.map(|image| image.path().map(Path::to_owned)).collect()
    }

    /// Returns the bitmaps of all layers that can be addressed by name, the image's own first, each
    /// name once.
    pub fn bitmaps_of_chain(&self) -> Vec<BitmapInfo> {
        let mut found: Vec<BitmapInfo> = Vec::new();
        let layers = self.chain.layers();
        let images = self.chain.qcow2_layers(&layers).flatten();
        for bitmap in images.flat_map(|image| image.bitmaps().list()) {
            if !found.iter().any(|other| other.name == bitmap.name) {
                found.push(bitmap);
            }
        }
        found
    }

    /// Returns all bitmaps of the layer in which a name is found, as in
    /// [`dirty_extents`](Self::dirty_extents); none if it is not found.
    pub fn bitmaps_beside(&self, name: &str) -> Vec<BitmapInfo> {
        self.in_layer_with_bitmap(name, |layer| Ok(layer.bitmaps().list())).unwrap_or_default()
    }

    fn in_layer_with_bitmap<T>(
        &self,
        name: &str,
        with: impl FnOnce(&Qcow2) -> Result<T>,
    ) -> Result<T> {
        if self.qcow2().is_none() {
            let what = self.format().description();
            let name = name.escape_debug();
            let detail = format!("a {what} image has no bitmaps, so there is no '{name}'");
            return Err(self.name(Error::new(
                ErrorKind::Unsupported,
                "look for a bitmap of",
                detail,
            )));
        }
        let layers = self.chain.layers();
        let found = self.chain.qcow2_layers(&layers).flatten().find(|it| it.bitmaps().has(name));
        with(found.ok_or_else(|| self.name(no_bitmap(name)))?)
    }
}
