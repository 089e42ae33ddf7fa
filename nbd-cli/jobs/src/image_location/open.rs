//! Opens and inspects images in files, exports and objects.

use std::sync::Arc;

use imgfmt::{Access, Error, Format, Image, ImageInfo, OpenOptions, Storage};
use nbd_client::ExportStorage;
use nbd_client::blocking::Client;

use super::ImageLocation;
use crate::error::{JobError, JobErrorKind};
use crate::object::ObjectUrl;
use crate::remote::Remotes;

/// The option of `nbd-cli` that declares an image to be raw.
const RAW_OPTION: &str = "--format raw";

/// The storage of an image that is not a file, and the options for it.
type OpenedStorage = (Arc<dyn Storage>, OpenOptions);

impl ImageLocation {
    /// Returns information about the image; the files and exports that it names are not opened.
    ///
    /// # Errors
    ///
    /// If the image cannot be read, or `options` contradict its name.
    pub fn inspect(&self, options: &OpenOptions, remotes: &Remotes) -> Result<ImageInfo, JobError> {
        let (location, options) = self.settled(options, remotes)?;
        match location.storage(&options, remotes)? {
            Some((storage, options)) => Image::inspect_storage(storage, &options)
                .map_err(|error| self.named(JobErrorKind::Source, error)),
            None => Image::inspect_file(location.path(), &options).map_err(opening),
        }
    }

    /// Returns information about the image and all layers of its backing chain, the image first;
    /// encrypted layers, which cannot be opened, are described as well.
    ///
    /// # Errors
    ///
    /// If a layer cannot be read, the policy in `options` forbids a name in the chain, the chain is
    /// a circle or too long, or `options` contradict the name of the image.
    pub fn inspect_chain(
        &self,
        options: &OpenOptions,
        remotes: &Remotes,
    ) -> Result<Vec<ImageInfo>, JobError> {
        let (location, options) = self.settled(options, remotes)?;
        match location.storage(&options, remotes)? {
            Some((storage, options)) => Image::inspect_storage_chain(storage, &options)
                .map_err(|error| opening(error.with_path(location.name()))),
            None => Image::inspect_chain(location.path(), &options).map_err(opening),
        }
    }

    /// Opens the storage of an image that is not a file.
    fn storage(
        &self,
        options: &OpenOptions,
        remotes: &Remotes,
    ) -> Result<Option<OpenedStorage>, JobError> {
        match self {
            Self::Export { uri, files } => {
                let storage: Arc<dyn Storage> = remotes.connect(uri, *files)?;
                Ok(Some((storage, remotes.for_export(options))))
            }
            Self::Object(url) => Ok(Some((remotes.open_object(url)?, url.options(options)))),
            Self::File(_) | Self::Described { .. } => Ok(None),
        }
    }

    /// Opens the image. If no format is specified, `remotes` say what an export is. Blocks, and
    /// must not be called by asynchronous tasks.
    ///
    /// # Errors
    ///
    /// If the image cannot be opened, or `options` contradict its name.
    pub fn open(&self, options: &OpenOptions, remotes: &Remotes) -> Result<Image, JobError> {
        self.open_or_name(options, remotes, RAW_OPTION)
    }

    /// Like [`open`](Self::open), and returns the export as well if it is the disk, byte for byte.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_disk_or_image(
        &self,
        options: &OpenOptions,
        remotes: &Remotes,
    ) -> Result<(Image, Option<Arc<ExportStorage>>), JobError> {
        let (location, options) = self.settled(options, remotes)?;
        let Self::Export { uri, files } = location else {
            return Ok((location.open(&options, remotes)?, None));
        };
        let storage = remotes.connect(uri, *files)?;
        let image = Image::from_storage(storage.clone(), &remotes.for_export(&options));
        let image = image.map_err(|error| opening(error.with_path(uri.to_string())))?;
        let is_disk = image.format() == Format::Raw && options.part.is_whole();
        Ok((image, is_disk.then_some(storage)))
    }

    /// Like [`open`](Self::open), with the option that declares this image to be raw, for errors.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_or_name(
        &self,
        options: &OpenOptions,
        remotes: &Remotes,
        raw_option: &str,
    ) -> Result<Image, JobError> {
        let (location, options) = self.settled(options, remotes)?;
        match location {
            Self::Export { uri, files } => {
                let storage = remotes.connect(uri, *files)?;
                if options.access == Access::ReadWrite && !storage.is_writable() {
                    return Err(JobError::source(format!(
                        "cannot write to {uri}: the server exports this disk read-only"
                    )));
                }
                Image::from_storage(storage, &remotes.for_export(&options))
                    .map_err(|error| opening(error.with_path(uri.to_string())))
            }
            Self::Object(url) => {
                if options.access == Access::ReadWrite {
                    return Err(read_only(url));
                }
                let opened = Image::from_storage(remotes.open_object(url)?, &url.options(&options));
                opened.map_err(|error| {
                    let error = error.with_path(url.to_string());
                    JobError::opening_with(JobErrorKind::Source, error, raw_option)
                })
            }
            file => Image::open(file.path(), &options)
                .map_err(|error| JobError::opening_with(JobErrorKind::Source, error, raw_option)),
        }
    }

    /// Opens an export as a disk to be overwritten, together with its client.
    ///
    /// # Errors
    ///
    /// If it is a file, or as [`open`](Self::open).
    pub fn open_disk(&self, remotes: &Remotes) -> Result<(Image, Client), JobError> {
        let storage = self.open_export_to_write(remotes)?;
        let client = storage.client().clone();
        let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
        let image = Image::from_storage(storage, &options);
        Ok((image.map_err(|error| opening(error.with_path(self.name())))?, client))
    }

    /// Connects to an export that is written to.
    ///
    /// # Errors
    ///
    /// If it is a file, the server cannot be reached, or it exports the disk read-only.
    pub fn open_export_to_write(&self, remotes: &Remotes) -> Result<Arc<ExportStorage>, JobError> {
        let Self::Export { uri, files } = self else {
            return Err(JobError::invalid(format!("{self} is not a server's disk")));
        };
        let storage = remotes.connect(uri, *files)?;
        match storage.is_writable() {
            true => Ok(storage),
            false => Err(JobError::invalid(format!(
                "cannot write to {uri}: the server exports this disk read-only"
            ))),
        }
    }
}

/// The refusal to write to an object.
pub(crate) fn read_only(url: &ObjectUrl) -> JobError {
    JobError::invalid(format!(
        "cannot write to {url}: objects of a store are read-only; write to an overlay of it"
    ))
}

fn opening(error: Error) -> JobError {
    JobError::opening_with(JobErrorKind::Source, error, RAW_OPTION)
}
