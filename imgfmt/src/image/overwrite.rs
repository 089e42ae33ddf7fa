//! Marks an image while its complete disk is overwritten.

use super::Image;
use crate::access::Access;
use crate::error::{Error, ErrorKind, Result};

impl Image {
    /// Announces that the complete disk will be overwritten: until
    /// [`complete_overwrite`](Self::complete_overwrite) it is neither the old disk nor the new one.
    /// A qcow2 image of version 3 is durably marked as incomplete from now on. This crate and QEMU
    /// refuse to open it, except with [`IncompleteDisk::Accepted`](crate::IncompleteDisk). Raw
    /// images and version 2 cannot be marked. Snapshots and bitmaps of the image stay.
    ///
    /// ```
    /// use imgfmt::{CreateOptions, Durability, Format, Image, IncompleteDisk, OpenOptions};
    ///
    /// # fn main() -> imgfmt::Result<()> {
    /// # let directory = tempfile::tempdir().expect("a directory for the example");
    /// # let path = directory.path().join("disk.qcow2");
    /// let disk = Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20))?;
    /// disk.begin_overwrite()?;
    /// disk.write_at(0.into(), &[1; 1000], Durability::Cached)?;
    /// drop(disk); // As if the program had been killed.
    /// assert!(Image::open(&path, &OpenOptions::new()).is_err());
    ///
    /// let again = OpenOptions::new().access(imgfmt::Access::ReadWrite);
    /// let disk = Image::open(&path, &again.incomplete(IncompleteDisk::Accepted))?;
    /// disk.begin_overwrite()?;
    /// disk.write_at(0.into(), &[1; 1 << 20], Durability::Cached)?;
    /// disk.complete_overwrite()?;
    /// disk.close()?;
    /// Image::open(&path, &OpenOptions::new())?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// `ReadOnly`, `Io`.
    pub fn begin_overwrite(&self) -> Result<()> {
        self.mark_incomplete(true)
    }

    /// Makes all data durable, and then marks the disk as complete.
    ///
    /// # Errors
    ///
    /// `ReadOnly`, `NoSpace`, `Io`. The image then remains marked as incomplete, unless only the
    /// last sync failed.
    pub fn complete_overwrite(&self) -> Result<()> {
        self.flush()?;
        self.mark_incomplete(false)
    }

    fn mark_incomplete(&self, is_incomplete: bool) -> Result<()> {
        if self.access != Access::ReadWrite {
            let error = Error::new(ErrorKind::ReadOnly, "change", "the image was opened read-only");
            return Err(self.name(error));
        }
        self.writable()?.mark_incomplete(is_incomplete).map_err(|error| self.name(error))
    }
}
