//! Looking at and changing the header of one image, without opening the files it names.

use std::path::Path;
use std::sync::Arc;

use crate::backup::BackupIdentity;
use crate::chain;
use crate::create::Amendment;
use crate::error::Result;
use crate::format::Format;
use crate::image::Image;
use crate::info::ImageInfo;
use crate::options::{Access, BackingFile, OpenOptions};
use crate::qcow2;
use crate::storage::Storage;

impl Image {
    /// Facts about the image in a file. The files it names are not opened, so that an image of
    /// unknown origin can be looked at safely. The options' access does not matter.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), except those of other files.
    pub fn inspect_file(path: impl AsRef<Path>, options: &OpenOptions) -> Result<ImageInfo> {
        let path = path.as_ref();
        let open = || options.open_file(path, Access::ReadOnly);
        let inspect = |file| chain::inspect(Arc::new(file), Some(path), options);
        open().and_then(inspect).map_err(|error| error.with_path(path))
    }

    /// Facts about the image in any storage, as [`inspect_file`](Self::inspect_file) gives them.
    ///
    /// # Errors
    ///
    /// As [`from_storage`](Self::from_storage), except those of other files.
    pub fn inspect_storage(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<ImageInfo> {
        chain::inspect(storage, None, options)
    }

    /// Refuses a name for the backing file of the image at `path`, which need not exist yet, if the
    /// chain of backing files would have too many layers (500) to be opened. Nothing else is checked:
    /// what the name leads to need not exist either.
    ///
    /// # Errors
    ///
    /// `Unsupported`.
    pub fn check_chain_length(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        (name, format): (&str, Format),
    ) -> Result<()> {
        chain::check_depth(path.as_ref(), options, name, format)
    }

    /// Writes into the file of a qcow2 image which backup it is, durably. Nobody may have it open.
    /// Whoever changes the disk afterwards makes [`Backup::is_unchanged`](crate::Backup) false.
    ///
    /// # Errors
    ///
    /// `Unsupported` if it has version 2 or its header has no room; `InvalidInput` for names that are
    /// too long; otherwise as [`open`](Self::open).
    pub fn seal_backup(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        identity: &BackupIdentity,
    ) -> Result<()> {
        let path = path.as_ref();
        options
            .open_file(path, Access::ReadWrite)
            .and_then(|file| qcow2::seal(&file, identity))
            .map_err(|error| error.with_path(path))
    }

    /// Makes a qcow2 image name another backing file (and its format), or none. Neither the old
    /// nor the new one is opened: the disk stays the same only if both hold the same where the
    /// image itself holds nothing. The header's cluster is written at once and synced.
    ///
    /// # Errors
    ///
    /// `Unsupported` for raw images; `InvalidInput` if the name is empty or does not fit into the
    /// header, or if the data lies in a raw data file; those of
    /// [`check_chain_length`](Self::check_chain_length); otherwise as [`open`](Self::open). Nothing
    /// has been changed then, unless it is `Io`.
    pub fn change_backing_file(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        backing: Option<(&str, Format)>,
    ) -> Result<()> {
        let path = path.as_ref();
        Self::recover_bitmaps(path, options)?;
        chain::change_backing(path, options, backing).map_err(|error| error.with_path(path))
    }

    /// Has bits that a crash left beside the image put back: they are found by what the header says, which is
    /// about to change.
    fn recover_bitmaps(path: &Path, options: &OpenOptions) -> Result<()> {
        let has_bitmaps = |info: ImageInfo| info.qcow2.is_some_and(|it| !it.bitmaps.is_empty());
        // What cannot be looked at is an error of the change itself.
        if Self::inspect_file(path, options).is_ok_and(has_bitmaps) {
            let writable = options.clone().access(Access::ReadWrite);
            Self::open(path, &writable.backing(BackingFile::Ignored))?.close()?;
        }
        Ok(())
    }

    /// Changes the header of a qcow2 image, and nothing else; the image is opened for writing before,
    /// so that what a crash left is put in order. Each change is one write that a crash leaves done
    /// or not done.
    ///
    /// # Errors
    ///
    /// `Unsupported` for other formats, for an older version, where the header has no room, and where a
    /// snapshot does not say its size; `InvalidInput` for lazy refcounts in version 2; otherwise as
    /// [`open`](Self::open).
    pub fn amend(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        amendment: &Amendment,
    ) -> Result<()> {
        let path = path.as_ref();
        Self::open(path, &options.clone().access(Access::ReadWrite))?.close()?;
        chain::amend(path, options, amendment).map_err(|error| error.with_path(path))
    }
}
