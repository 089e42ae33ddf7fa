//! A conversion to one of the destinations.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgfmt::jobs::{self, Background, Clusters, MeasuredDisk, SourceReader, Zeroes, copy_bitmaps};
use imgfmt::storage::FileIdentity;
use imgfmt::{
    Access, BitmapInfo, CacheMode, CreateOptions, Format, Image, IncompleteDisk, OpenOptions,
    OpenPolicy, Preallocation, Storage,
};
use nbd_proto::NbdUri;

use super::bitmaps;
use super::options::{ConvertOptions, Destination};
use super::output::OutputStorage;
use crate::error::{JobError, JobErrorKind};
use crate::image_location::ImageLocation;
use crate::observer::JobContext;
use crate::target::{Durable, NewFile, device, final_name};

/// Most rounds that may end with a new connection before a copy to a server fails.
const MAX_ROUNDS: usize = 8;
/// Default number of threads that copy to or from a server: most of them wait.
const REMOTE_THREADS: NonZeroUsize = NonZeroUsize::new(8).expect("it is not zero");

/// Returns the error with the state it leaves.
fn left(error: &JobError, left: &str) -> JobError {
    error.in_words(format!("{error}; {left}"))
}

fn incomplete(to: &ImageLocation, error: &JobError) -> JobError {
    error.in_words(format!("{error}; the disk in {to} is incomplete: run the command again"))
}

/// The source and the options of the copy.
pub(super) struct Conversion<'a> {
    pub(super) options: &'a ConvertOptions,
    pub(super) source: &'a Image,
    /// The files and devices that the source is in.
    pub(super) files: Vec<FileIdentity>,
    /// Reads the source, if it fills another server's export.
    pub(super) reader: Option<Arc<dyn SourceReader>>,
    pub(super) from: &'a ImageLocation,
    /// The bitmaps of the source to copy.
    pub(super) bitmaps: Vec<BitmapInfo>,
    /// Whether the source or the destination is on a server.
    pub(super) is_remote: bool,
    pub(super) context: &'a JobContext,
}

impl Conversion<'_> {
    /// Creates the image; after an error no file remains.
    pub(super) fn make_new(&self, path: &Path) -> Result<(), JobError> {
        if self.options.destination == Destination::New {
            // Not "remove it first".
            self.refuse_own_device(path)?;
        }
        let mut create = self.options.create.clone();
        create.size = Some(self.source.size());
        create.open = self.for_filling();
        create.foreign.final_name = final_name(path);
        let make = |path: &Path| Image::create(path, &create).map_err(in_destination);
        let (observer, locking) = (&self.context.observer, self.options.create.open.locking);
        let (mut new, image) = match self.options.destination {
            Destination::Replaced => NewFile::begin_or_replace(path, locking, observer, make),
            _ => NewFile::begin(path, observer, make),
        }?;
        if let Some((name, _)) = &create.data_file {
            // It was created too: one that exists is an error.
            new.add_companion(new.path().with_file_name(name));
        } else {
            new.add_extents(&image, locking)?;
        }
        let filled = self.fill(image, &ImageLocation::File(new.path().to_owned()));
        filled.map_err(|error| left(&error, &new.left_behind()))?;
        new.complete(self.options.durable)
    }

    /// Creates the image on a device, whose content is lost.
    pub(super) fn make_on_device(&self, path: &Path) -> Result<(), JobError> {
        self.refuse_own_device(path)?;
        let mut create = self.options.create.clone();
        create.size = Some(self.source.size());
        create.open = self.for_filling();
        let new = device::begin_image(path, &create, &*self.context.observer)?;
        let filled = new
            .open(&self.for_filling())
            .map_err(in_destination)
            .and_then(|image| self.fill(image, &ImageLocation::File(path.to_owned())))
            .and_then(|()| new.complete().map_err(in_destination));
        filled.map_err(|error| left(&error, &device::left_behind(path)))
    }

    /// Creates the image in the export of a server, whose content is lost.
    pub(super) fn make_on_server(&self, to: &ImageLocation) -> Result<(), JobError> {
        let mut create = self.options.create.clone();
        create.size = Some(self.source.size());
        create.open = self.for_filling();
        let named = |error| to.named(JobErrorKind::Destination, error);
        let export = to.open_export_to_write(&self.options.remotes)?;
        self.check_room_for_image(to, &*export, &create)?;
        let new = Image::create_in_storage(export, &create).map_err(named)?;
        self.context.observer.warning(&format!(
            "the data on {to} is overwritten, and lost even if this command is interrupted"
        ));
        let filled = new
            .preallocate()
            .and_then(|()| new.open(&self.for_filling()))
            .map_err(named)
            .and_then(|image| self.fill(image, to))
            .and_then(|()| new.complete().map_err(named));
        filled.map_err(|error| {
            let state = "is lost, and it is marked as incomplete: run the command again";
            left(&error, &format!("the previous data on {to} {state}"))
        })
    }

    /// Refuses an export that is too small for the image, before anything is written to it. The
    /// size of compressed data is not known before.
    fn check_room_for_image(
        &self,
        to: &ImageLocation,
        export: &dyn Storage,
        create: &CreateOptions,
    ) -> Result<(), JobError> {
        if self.options.clusters == Clusters::Compressed || create.backing.is_some() {
            return Ok(());
        }
        let cancellation = self.context.cancellation.of_image_jobs();
        let context = jobs::JobContext { cancellation, ..jobs::JobContext::default() };
        let measured = jobs::measure(MeasuredDisk::Image(self.source), create, &context);
        let measured = measured.map_err(|error| self.named(to, error))?;
        let bitmaps = measured.bitmaps.filter(|_| !self.bitmaps.is_empty());
        let needed = measured.required.saturating_add(bitmaps.unwrap_or(0));
        let room = export.len().map_err(|error| JobError::destination(format!("{to}: {error}")))?;
        match needed <= room {
            true => Ok(()),
            false => Err(JobError::destination(format!(
                "{to} has {room} bytes, and the image takes up {needed}: it does not fit"
            ))),
        }
    }

    fn refuse_own_device(&self, path: &Path) -> Result<(), JobError> {
        device::refuse_of_source(path, &self.files)
    }

    /// Refuses files of an existing image that share data with the source: locks do not find other
    /// names of it. Parts of one file may be different disks.
    fn refuse_own_files(&self, files: &[PathBuf]) -> Result<(), JobError> {
        if !self.options.read.part.is_whole() || !self.options.write.part.is_whole() {
            return Ok(());
        }
        files.iter().try_for_each(|path| self.refuse_own_device(path))
    }

    /// Returns the options for opening the new image.
    fn for_filling(&self) -> OpenOptions {
        OpenOptions::new()
            .locking(self.options.create.open.locking)
            .format(self.options.create.format)
            .access(Access::ReadWrite)
            // An unfinished image need not be durable: one sync at the end is enough.
            .cache(self.options.cache.unwrap_or(CacheMode::Unsafe))
            .written_once()
            .policy(match self.options.create.backing {
                Some(_) => self.options.create.open.policy.clone(),
                None => OpenPolicy::deny(),
            })
    }

    fn fill(&self, image: Image, to: &ImageLocation) -> Result<(), JobError> {
        let create = &self.options.create;
        // What is set aside of an encrypted disk reads as noise.
        let is_noise = create.encryption.is_some()
            && matches!(create.preallocation, Preallocation::Metadata | Preallocation::Falloc);
        let background = match &create.backing {
            Some(_) => Background::Compared,
            None if is_noise || create.format == Format::Luks => Background::Unknown,
            None => Background::Zero,
        };
        self.copy(&image, to, background)?;
        copy_bitmaps(self.source, &image, &self.bitmaps).map_err(|error| self.named(to, error))?;
        image.close().map_err(|error| to.named(JobErrorKind::Destination, error))
    }

    /// Writes the disk onto a device, raw.
    pub(super) fn overwrite_device(&self, path: &Path) -> Result<(), JobError> {
        self.refuse_own_device(path)?;
        let (locking, cache) = (self.options.create.open.locking, self.options.cache);
        // The syncs of an unfinished disk are few, and protect what is on the device.
        let cache = cache.filter(|cache| cache.syncs()).unwrap_or_default();
        let disk = device::begin_disk(path, locking, cache)?;
        let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite).cache(cache);
        let image = Image::from_storage(disk.clone(), &options).map_err(in_destination)?;
        let to = ImageLocation::File(path.to_owned());
        self.check_room(&to, &image)?;
        device::warn_of_loss(path, &*self.context.observer);
        let copied = self
            .copy(&image, &to, self.options.background)
            .and_then(|()| image.close().map_err(in_destination));
        copied.map_err(|error| left(&error, &device::left_behind_on(path, &disk)))?;
        device::complete_disk(path, &disk)
    }

    /// Overwrites the existing disk.
    pub(super) fn replace(&self, to: &ImageLocation) -> Result<(), JobError> {
        let options = self.options.write.clone();
        let options = options.format(self.options.create.format).access(Access::ReadWrite);
        // An earlier conversion may have left the disk incomplete: this one makes it whole.
        let options = options.incomplete(IncompleteDisk::Accepted);
        // As on a device, the mark of an incomplete disk has to be durable.
        let cache = self.options.cache.filter(|cache| cache.syncs()).unwrap_or(options.cache);
        let options = options.cache(cache);
        if let ImageLocation::File(path) = to {
            // Before the locks, which would blame another program.
            self.refuse_own_files(std::slice::from_ref(path))?;
        }
        let image = to.open(&options, &self.options.remotes)?;
        self.check_room(to, &image)?;
        self.refuse_own_files(&image.own_files())?;
        bitmaps::check_existing(&self.bitmaps, self.source, &image, to)?;
        image.begin_overwrite().map_err(|error| to.named(JobErrorKind::Destination, error))?;
        self.copy(&image, to, self.options.background).map_err(|error| incomplete(to, &error))?;
        if self.options.create.format != Format::Raw {
            image
                .complete_overwrite()
                .map_err(|error| incomplete(to, &to.named(JobErrorKind::Destination, error)))?;
        }
        copy_bitmaps(self.source, &image, &self.bitmaps).map_err(|error| self.named(to, error))?;
        if self.options.durable == Durable::Now {
            return image.close().map_err(|error| to.named(JobErrorKind::Destination, error));
        }
        // Changes of metadata must not be lost; data is as durable as any other write.
        match self.options.create.format {
            Format::Raw => Ok(()),
            _ => image.close().map_err(|error| to.named(JobErrorKind::Destination, error)),
        }
    }

    /// Overwrites the disk of a server. If the server restarts in between, it may have lost writes
    /// that were not durable: then everything is written again.
    pub(super) fn to_server(&self, to: &ImageLocation, uri: &NbdUri) -> Result<(), JobError> {
        let (image, client) = to.open_disk(&self.options.reconnecting)?;
        self.check_room(to, &image)?;
        for _ in 0..MAX_ROUNDS {
            let before = client.reconnects();
            self.copy(&image, to, self.options.background)
                .map_err(|error| incomplete(to, &error))?;
            if self.options.durable == Durable::Now {
                image
                    .flush()
                    .map_err(|error| incomplete(to, &to.named(JobErrorKind::Destination, error)))?;
            }
            if client.reconnects() == before {
                return Ok(());
            }
            self.context.observer.warning(&format!(
                "the connection to {uri} was lost, and its server may have lost what was not flushed: \
                 everything is written again"
            ));
        }
        Err(incomplete(
            to,
            &JobError::destination(format!("the connection to {uri} is lost again and again")),
        ))
    }

    /// Writes an image to standard output, from the start to the end.
    pub(super) fn to_output(&self, output: &Arc<OutputStorage>) -> Result<(), JobError> {
        let mut create = self.options.create.clone();
        create.size = Some(self.source.size());
        let to = ImageLocation::File("standard output".into());
        let image = Image::create_in_order(Arc::clone(output) as _, &create);
        let image = image.map_err(in_destination)?;
        self.copy(&image, &to, Background::Zero)
            // Dropped, it would be completed.
            .inspect_err(|_| output.abandon())
            .and_then(|()| image.close().map_err(in_destination))
    }

    fn check_room(&self, to: &ImageLocation, image: &Image) -> Result<(), JobError> {
        let (room, size) = (image.size(), self.source.size());
        if room < size {
            return Err(JobError::destination(format!(
                "{to} has {room} bytes and the source {size}: it does not fit"
            )));
        }
        Ok(())
    }

    fn copy(
        &self,
        image: &Image,
        to: &ImageLocation,
        background: Background,
    ) -> Result<(), JobError> {
        let mut options = jobs::ConvertOptions::default();
        if self.is_remote {
            options.threads = REMOTE_THREADS;
        }
        options.threads = self.options.threads.unwrap_or(options.threads);
        options.background = background;
        options.clusters = self.options.clusters;
        (options.zeroes, options.unreadable) = (self.options.zeroes, self.options.unreadable);
        let create = &self.options.create;
        if create.encryption.is_some() && create.preallocation == Preallocation::Falloc {
            // Zeroes of other kinds would give the space back.
            options.zeroes = Zeroes::Data;
        }
        options.reader.clone_from(&self.reader);
        let converted = jobs::convert(self.source, image, &options, &self.context.for_images());
        converted.map(drop).map_err(|error| self.named(to, error))
    }

    /// Whether the source is made of several, or of a part of one.
    fn is_joined(&self) -> bool {
        !self.options.more.is_empty() || self.options.part != (0..u64::MAX)
    }

    /// Returns the error with the name of the image at fault, if it has none yet.
    fn named(&self, to: &ImageLocation, error: jobs::JobError) -> JobError {
        let (location, kind) = match error.kind() {
            jobs::JobErrorKind::Source => (self.from, JobErrorKind::Source),
            _ => (to, JobErrorKind::Destination),
        };
        match error.into_image_error() {
            // Of joined sources, the one at fault is named already.
            Ok(error) if kind == JobErrorKind::Source && self.is_joined() => {
                JobError::image(kind, error)
            }
            Ok(error) => location.named(kind, error),
            Err(error) => error.into(),
        }
    }
}

fn in_destination(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Destination, error)
}
