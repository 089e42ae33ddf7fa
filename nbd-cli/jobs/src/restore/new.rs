//! What a restore makes: it becomes valid when the restore is complete.

use std::path::Path;
use std::sync::Arc;

use imgfmt::{
    Access, CreateOptions, Format, Image, NewOnDevice, OpenOptions, OpenPolicy, Unfinished,
};

use super::options::RestoreOptions;
use crate::copy::Knowledge;
use crate::copy::destination::{Background, Destination};
use crate::copy::local_file::create_empty;
use crate::copy::source::Source;
use crate::error::{JobError, JobErrorKind};
use crate::location::Location;
use crate::observer::JobContext;
use crate::target::{self, Durable, Existing, NewFile, device};

/// The object that becomes valid when the restore is complete.
pub(super) enum New {
    File(NewFile),
    /// An image in a file.
    ImageFile(NewFile, Option<Image>),
    /// An image on a device.
    Image(NewOnDevice),
    /// A raw disk on a device.
    Disk(Arc<Unfinished>),
    /// A server's disk, which exposes writes at once.
    Nothing,
}

impl New {
    /// Begins it.
    ///
    /// # Errors
    ///
    /// If it cannot be made.
    pub(super) fn begin(
        to: &Location,
        options: &RestoreOptions,
        size: u64,
        is_new: bool,
        context: &JobContext,
    ) -> Result<Self, JobError> {
        match to {
            Location::File(path) if is_new && is_image(options) => {
                let mut create = CreateOptions::new(Format::Qcow2, size);
                create.open = create.open.policy(OpenPolicy::deny()).written_once();
                let make = |path: &Path| Image::create(path, &create).map_err(image_error);
                let (new, image) = NewFile::begin(path, &context.observer, make)?;
                Ok(Self::ImageFile(new, Some(image)))
            }
            Location::File(path) if is_new => {
                let (new, ()) = NewFile::begin(path, &context.observer, create_empty)?;
                Ok(Self::File(new))
            }
            Location::File(device) if is_image(options) => {
                let options = CreateOptions::new(Format::Qcow2, size);
                Ok(Self::Image(device::begin_image(device, &options, &*context.observer)?))
            }
            // A device opened as raw is detected when it is opened.
            _ => Ok(Self::Nothing),
        }
    }

    /// Opens it for writing.
    ///
    /// # Errors
    ///
    /// If it cannot be opened.
    pub(super) async fn open(
        &mut self,
        to: &Location,
        options: &RestoreOptions,
        source: &Source,
        context: &JobContext,
    ) -> Result<Destination, JobError> {
        let writable = plain(Format::Qcow2).access(Access::ReadWrite);
        match self {
            Self::ImageFile(new, image) => {
                let opened = image.take().map_or_else(|| Image::open(new.path(), &writable), Ok);
                Ok(Destination::image(opened.map_err(image_error)?, Background::Zero))
            }
            Self::File(new) => Destination::new_file(new),
            Self::Image(new) => {
                let image = new.open(&writable).map_err(image_error)?;
                Ok(Destination::image(image, Background::Zero))
            }
            Self::Disk(_) | Self::Nothing => {
                let (connect, locking) = (&options.connect, options.destination_locking);
                let opened = Destination::open(to, connect, locking, source, context).await?;
                if let Some(disk) = opened.device() {
                    *self = Self::Disk(disk);
                }
                Ok(opened)
            }
        }
    }

    /// Opens it for reading what was written.
    ///
    /// # Errors
    ///
    /// If it cannot be opened.
    pub(super) async fn reopen(
        &self,
        to: &Location,
        options: &RestoreOptions,
        context: &JobContext,
    ) -> Result<Source, JobError> {
        let (connect, locking) = (&options.connect, options.destination_locking);
        let written =
            async |place| Source::open(place, connect, locking, Knowledge::Holes, context).await;
        let reopened = |image: imgfmt::Result<Image>| {
            image.map(|image| Source::image(Arc::new(image))).map_err(image_error)
        };
        match self {
            Self::ImageFile(new, _) => reopened(Image::open(new.path(), &plain(Format::Qcow2))),
            Self::File(new) => written(&Location::File(new.path().to_owned())).await,
            Self::Image(new) => reopened(new.open(&plain(Format::Qcow2))),
            Self::Disk(disk) => reopened(Image::from_storage(disk.clone(), &plain(Format::Raw))),
            Self::Nothing => written(to).await,
        }
    }

    /// Makes it valid.
    ///
    /// # Errors
    ///
    /// If it cannot be made durable or be named.
    pub(super) fn complete(self, to: &Location) -> Result<(), JobError> {
        match (self, to) {
            (Self::File(new) | Self::ImageFile(new, _), _) => new.complete(Durable::Now),
            (Self::Image(new), Location::File(path)) => device::complete_image(path, new),
            (Self::Disk(disk), Location::File(path)) => device::complete_disk(path, &disk),
            _ => Ok(()),
        }
    }

    /// Describes the state after a failure, in words that follow a semicolon.
    pub(super) fn left_behind(&self, to: &Location) -> String {
        match (self, to) {
            (Self::File(new) | Self::ImageFile(new, _), _) => new.left_behind(),
            (Self::Image(_), Location::File(device)) => device::left_behind(device),
            (Self::Disk(disk), Location::File(device)) => device::left_behind_on(device, disk),
            _ => format!("{to} is incomplete"),
        }
    }
}

/// Returns whether the result is an image rather than the disk itself.
fn is_image(options: &RestoreOptions) -> bool {
    options.format == Format::Qcow2
}

/// Returns whether no file of that name exists; a device may.
///
/// # Errors
///
/// If it is a file, or an object that cannot be written to.
pub(super) fn is_new(path: &Path) -> Result<bool, JobError> {
    match target::look(path)? {
        Existing::Nothing => Ok(true),
        Existing::BlockDevice => Ok(false),
        Existing::File => Err(JobError::destination(format!(
            "'{}' exists already; give the name of a new file",
            path.display()
        ))),
    }
}

/// An image without a backing file.
fn plain(format: Format) -> OpenOptions {
    OpenOptions::new().format(format).policy(OpenPolicy::deny())
}

fn image_error(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Destination, error)
}
