//! Internal snapshots, and emptying a layer.

use super::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{Changed, Qcow2};
use crate::units::GuestOffset;

impl Image {
    /// Creates an internal snapshot of this name from the present state of the disk.
    ///
    /// # Errors
    ///
    /// `ReadOnly`; `Unsupported` for raw images and where refcounts are too narrow; `InvalidInput`
    /// if there is a snapshot of that name; `Busy` while a [`ReadMap`](crate::ReadMap) is held;
    /// `NoSpace`, `Corrupt`, `Io`.
    pub fn create_snapshot(&mut self, name: &str) -> Result<()> {
        self.change_snapshots(|image| image.create_snapshot(name))
    }

    /// Restores the content and the size of the disk from an internal snapshot, given by id or
    /// name. Data written since is lost. All bits of recording bitmaps are set.
    ///
    /// # Errors
    ///
    /// As [`create_snapshot`](Self::create_snapshot); `NotFound`; and `Unsupported` if the size
    /// differs and there are snapshots that do not record theirs, as in images of version 2.
    pub fn apply_snapshot(&mut self, name: &str) -> Result<()> {
        self.change_snapshots(|image| image.apply_snapshot(name))
    }

    /// Deletes an internal snapshot, given by id or name.
    ///
    /// # Errors
    ///
    /// As [`create_snapshot`](Self::create_snapshot), and `NotFound`.
    pub fn delete_snapshot(&mut self, name: &str) -> Result<()> {
        self.change_snapshots(|image| image.delete_snapshot(name))
    }

    /// Discards all content of the image itself, so that its backing file's content shows (or
    /// zeroes, if it has none). Snapshots stay. All bits of recording bitmaps are set.
    ///
    /// # Errors
    ///
    /// As [`create_snapshot`](Self::create_snapshot).
    pub fn clear(&mut self) -> Result<()> {
        self.change_snapshots(|image| image.clear(Changed::Everything))
    }

    /// Like [`clear`](Self::clear), after all content was written into the backing file (see
    /// [`jobs::commit`](crate::jobs::commit)): the disk reads as before, so its bitmaps do not
    /// change. If anything was not written there, the bitmaps lack changes.
    ///
    /// # Errors
    ///
    /// As [`create_snapshot`](Self::create_snapshot).
    pub fn clear_committed(&mut self) -> Result<()> {
        self.change_snapshots(|image| image.clear(Changed::Nothing))
    }

    fn change_snapshots(&mut self, change: impl FnOnce(&mut Qcow2) -> Result<()>) -> Result<()> {
        self.check_change("change", GuestOffset::new(0), 0)?;
        let result = match self.chain.top.qcow2_mut() {
            Some(image) => change(image),
            None => {
                let detail = "only qcow2 images have snapshots and layers; convert it to qcow2";
                Err(Error::new(ErrorKind::Unsupported, "change", detail))
            }
        };
        result.map_err(|error| self.name(error))
    }
}
