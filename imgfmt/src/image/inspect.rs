//! Reads and changes the header of one image without opening the files it names.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use super::{Image, Shrink};
use crate::access::Access;
use crate::archive;
use crate::backing_file::BackingFile;
use crate::backup::BackupIdentity;
use crate::chain;
use crate::create_options::{Amendment, Qcow2Version};
use crate::error::Result;
use crate::format::Format;
use crate::info::ImageInfo;
use crate::options::OpenOptions;
use crate::qcow2::{self, CheckReport, Repair};
use crate::storage::Storage;

/// Opens a file, or a disk in an archive; returns how what is in it is opened.
fn open_file(
    path: &Path,
    options: &OpenOptions,
    access: Access,
) -> Result<(Arc<dyn Storage>, OpenOptions)> {
    match archive::open(path, options, access)? {
        Some(disk) => {
            let options = archive::options(options, &disk);
            Ok((disk.storage, options))
        }
        None => Ok((Arc::new(options.open_file(path, access)?), options.clone())),
    }
}

impl Image {
    /// Checks the qcow2 image in a file and, if `repair` says so, repairs it. No other process may
    /// use it meanwhile. The files it names are not examined. Of VHDX, VMDK and VDI images it is
    /// checked whether every block can lie where the tables say, also in the files with parts of
    /// the disk; [`Repair::All`] makes the changes that the log of a VHDX image holds.
    ///
    /// # Errors
    ///
    /// `Unsupported` for formats that cannot be checked or repaired; otherwise as
    /// [`open`](Self::open).
    pub fn check_file(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        repair: Repair,
    ) -> Result<CheckReport> {
        let path = path.as_ref();
        let check =
            |(storage, options)| chain::check_storage(storage, Some(path), &options, repair);
        open_file(path, options, repair.access())
            .and_then(check)
            .map_err(|error| error.with_path(path))
    }

    /// Returns information about the image in a file. The files it names are not opened, so that an
    /// image of unknown origin can be inspected safely. The access option has no effect.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), except those of other files.
    pub fn inspect_file(path: impl AsRef<Path>, options: &OpenOptions) -> Result<ImageInfo> {
        let path = path.as_ref();
        let inspect = |(file, options)| chain::inspect(file, Some(path), &options);
        open_file(path, options, Access::ReadOnly)
            .and_then(inspect)
            .map_err(|error| error.with_path(path))
    }

    /// Returns information about the image in any storage, like
    /// [`inspect_file`](Self::inspect_file): in memory, on a server, or within another image.
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use imgfmt::storage::MemoryStorage;
    /// use imgfmt::{CreateOptions, Format, Image, OpenOptions};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("upload.qcow2");
    /// # Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 30))?;
    /// let upload: Vec<u8> = std::fs::read(&path)?;
    /// let storage = Arc::new(MemoryStorage::from_bytes(&upload));
    /// let info = Image::inspect_storage(storage, &OpenOptions::new())?;
    /// assert_eq!((info.format, info.size), (Format::Qcow2, 1 << 30));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`from_storage`](Self::from_storage), except those of other files.
    pub fn inspect_storage(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<ImageInfo> {
        chain::inspect(storage, None, options)
    }

    /// Returns information about the image in a file and about all layers of its backing chain, the
    /// image first. Their disks and data files are not opened, so encrypted layers are described
    /// without their keys. The access option has no effect.
    ///
    /// # Errors
    ///
    /// `PolicyDenied` if the policy in `options` forbids a name in the chain; `InvalidFormat` if
    /// the chain leads back to itself; `Unsupported` if it has more than 500 layers or one of a
    /// format that is only recognised; otherwise as [`inspect_file`](Self::inspect_file).
    pub fn inspect_chain(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Vec<ImageInfo>> {
        let path = path.as_ref();
        let inspect = |(file, options)| chain::inspect_chain(file, Some(path), &options);
        open_file(path, options, Access::ReadOnly)
            .and_then(inspect)
            .map_err(|error| error.with_path(path))
    }

    /// Returns information about the image in any storage and about all layers of its backing
    /// chain, like [`inspect_chain`](Self::inspect_chain).
    ///
    /// # Errors
    ///
    /// As [`inspect_chain`](Self::inspect_chain).
    pub fn inspect_storage_chain(
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
    ) -> Result<Vec<ImageInfo>> {
        chain::inspect_chain(storage, None, options)
    }

    /// Refuses a name for the backing file of the image at `path`, which need not exist yet, if the
    /// image could not be opened: its chain of backing files would have too many layers (500), or
    /// lead back to itself. Nothing else is checked: the backing file need not exist either. Only
    /// headers are read; the policy in `options` decides about names with a scheme, and not about
    /// files.
    ///
    /// # Errors
    ///
    /// `Unsupported` if the chain would be too long, `InvalidInput` if it would lead back.
    pub fn check_new_backing(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        (name, format): (&OsStr, Format),
    ) -> Result<()> {
        let path = path.as_ref();
        chain::check_new_backing(path, options, name, format).map_err(|error| error.with_path(path))
    }

    /// Writes the identity of a backup into the file of a qcow2 image, durably. The image must not
    /// be open. A later change of the disk makes [`Backup::is_unchanged`](crate::Backup) false.
    ///
    /// # Errors
    ///
    /// `Unsupported` if it has version 2 or its header has no space left; `InvalidInput` for names
    /// that are too long; otherwise as [`open`](Self::open).
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

    /// Sets the backing file of a qcow2 image (and its format), or removes it. Neither the old nor
    /// the new one is opened: the disk keeps its content only if both have the same content where
    /// the image itself has none. After a crash the header names the old or the new one, possibly
    /// without a format, which is refused by default. Where the header has no space for both names
    /// at once, an interrupted change leaves an image of version 3 marked as unfinished: it cannot
    /// be opened until this method is called again. An image of version 2 may then have a damaged
    /// header.
    ///
    /// # Errors
    ///
    /// `Unsupported` for raw images; `InvalidInput` if the name is empty or does not fit into the
    /// header, or if the data is in a raw data file; those of
    /// [`check_new_backing`](Self::check_new_backing); otherwise as [`open`](Self::open). After
    /// any error but `Io`, nothing has changed.
    pub fn change_backing_file(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        backing: Option<(&OsStr, Format)>,
    ) -> Result<()> {
        let path = path.as_ref();
        Self::recover_bitmaps(path, options)?;
        chain::change_backing(path, options, backing).map_err(|error| error.with_path(path))
    }

    /// Recovers the bits of bitmaps that a crash left beside the image: the header that identifies
    /// them is about to change.
    fn recover_bitmaps(path: &Path, options: &OpenOptions) -> Result<()> {
        let has_bitmaps = |info: ImageInfo| info.qcow2.is_some_and(|it| !it.bitmaps.is_empty());
        // The change itself reports the error of a file that cannot be examined.
        if Self::inspect_file(path, options).is_ok_and(has_bitmaps) {
            let writable = options.clone().access(Access::ReadWrite);
            Self::open(path, &writable.backing(BackingFile::Ignored))?.close()?;
        }
        Ok(())
    }

    /// Changes properties of a qcow2 image. The disk, its snapshots and its bitmaps keep their
    /// contents. The image is first opened for writing, which repairs the remains of a crash. It
    /// must not be in use. If the change is interrupted, the image has all, some or none of the
    /// requested properties, and at worst leaked clusters.
    ///
    /// # Errors
    ///
    /// `Unsupported` for other formats, for a version that lacks a feature of the image, if the
    /// header has no space left, if a snapshot does not record its size, and for refcounts that are
    /// too narrow; `InvalidInput` for options that the version does not have, and for a smaller
    /// size; otherwise as [`open`](Self::open).
    pub fn amend(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        amendment: &Amendment,
    ) -> Result<()> {
        let path = path.as_ref();
        let open = || options.open_file(path, Access::ReadWrite);
        open()
            .and_then(|file| {
                Self::amend_named(&(Arc::new(file) as _), Some(path), options, amendment)
            })
            .map_err(|error| error.with_path(path))
    }

    /// Changes properties of an image in any storage, like [`amend`](Self::amend).
    ///
    /// # Errors
    ///
    /// As [`amend`](Self::amend).
    pub fn amend_storage(
        storage: &Arc<dyn Storage>,
        options: &OpenOptions,
        amendment: &Amendment,
    ) -> Result<()> {
        Self::amend_named(storage, None, options, amendment)
    }

    fn amend_named(
        storage: &Arc<dyn Storage>,
        path: Option<&Path>,
        options: &OpenOptions,
        amendment: &Amendment,
    ) -> Result<()> {
        options.refuse_part("amend")?;
        chain::refuse_to_amend(&**storage, options)?;
        let options = options.clone().access(Access::ReadWrite);
        let open = || Self::open_named(Arc::clone(storage), path, &options);
        open()?.close()?;
        qcow2::refuse_amendment(&**storage, amendment)?;
        if amendment.version == Some(Qcow2Version::V3) {
            // Wider refcounts need it.
            let version = Amendment { version: amendment.version, ..Amendment::default() };
            qcow2::amend(&**storage, &version)?;
        }
        if let Some(size) = amendment.size {
            let mut image = open()?;
            image.resize(size, Shrink::Refuse)?;
            image.close()?;
        }
        if amendment.version == Some(Qcow2Version::V2) {
            let image = open()?;
            image.qcow2().map_or(Ok(()), qcow2::Qcow2::expand_zeroes)?;
            image.close()?;
        }
        if let Some(bits) = amendment.refcount_bits {
            let mut image = open()?;
            image.change_refcount_width(bits.trailing_zeros())?;
            image.close()?;
        }
        qcow2::amend(&**storage, amendment)
    }
}
