//! The destination of a copy.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use imgfmt::storage::{Backlog, FileStorage};
use imgfmt::{
    Access, CacheMode, GuestOffset, GuestRange, HostOffset, Image, Locking, Storage, Unfinished,
};
use nbd_client::{Client, Durability, Speed, ZeroMode};
use nbd_proto::NbdUri;
use nbd_proto::wire::{Errno, TransmissionFlags};
use tokio::sync::Semaphore;

use super::local_file::{LocalFile, file_error, image_error, open_for_overwriting};
use super::source::Source;
use super::writer::Writer;
use crate::connect::{self, ConnectOptions, failed};
use crate::error::{JobError, JobErrorKind};
use crate::lanes;
use crate::location::Location;
use crate::observer::JobContext;
use crate::target::{Durable, NewFile, device};
use crate::tasks;
use crate::zeroes::ZEROES;

/// Threads that write to an image at a time: much of their work is not I/O.
const IMAGE_WRITERS: usize = 4;

/// An open destination.
pub(crate) enum Destination {
    Nbd {
        client: Client,
        uri: NbdUri,
    },
    File {
        storage: Arc<dyn Storage>,
        path: PathBuf,
        kind: FileKind,
        /// The same storage, if it is a device, which exposes its contents when it is complete.
        device: Option<Arc<Unfinished>>,
        /// The file, if it does not have its final name yet.
        new: Mutex<Option<NewFile>>,
        writer: Writer,
    },
    /// A disk in an image format.
    Image {
        image: Arc<Image>,
        background: Background,
        /// Limits the number of writing threads.
        writers: Semaphore,
    },
    /// Standard output: written once, front to back.
    Standard,
    Null,
}

/// The content of an image where nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Background {
    Zero,
    /// That of its backing file, or earlier data.
    Unknown,
}

/// The kind of a local file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    /// It was truncated, so that it reads as zero, and grows with the writes.
    Regular,
    BlockDevice,
}

impl Destination {
    /// Opens the destination and checks that the source fits.
    pub(crate) async fn open(
        location: &Location,
        connect: &ConnectOptions,
        locking: Locking,
        source: &Source,
        context: &JobContext,
    ) -> Result<Self, JobError> {
        let destination = match location {
            Location::Nbd(uri) => {
                let (connector, whose) = (connect.connector(uri), JobErrorKind::Destination);
                let client =
                    connect::connect(&connector, uri, whose, &context.cancellation).await?;
                if client.info().flags.contains(TransmissionFlags::READ_ONLY) {
                    return Err(JobError::destination(format!(
                        "cannot copy to {uri}: the server exports this disk read-only"
                    )));
                }
                Self::Nbd { client, uri: uri.clone() }
            }
            Location::File(path) => match open_for_overwriting(path, locking, source, context)? {
                LocalFile::Regular(storage, new) => Self::regular(storage, path, new),
                LocalFile::BlockDevice => Self::block_device(path, locking)?,
            },
            Location::Object(url) => {
                return Err(JobError::destination(format!(
                    "cannot copy to {url}: objects are written by 'nbd-cli image push'"
                )));
            }
            Location::Standard => Self::Standard,
            Location::Null => Self::Null,
        };
        if let (Some(room), Some(size)) = (destination.room()?, source.size())
            && size > room
        {
            return Err(JobError::destination(format!(
                "{location} has {room} bytes and the source {size}: it does not fit"
            )));
        }
        if let Self::File { device: Some(_), path, .. } = &destination {
            device::warn_of_loss(path, &*context.observer);
        }
        Ok(destination)
    }

    /// An image that was just created or opened for writing.
    pub(crate) fn image(image: Image, background: Background) -> Self {
        let writers = Semaphore::new(IMAGE_WRITERS);
        Self::Image { image: Arc::new(image), background, writers }
    }

    /// Returns the capacity, if it is limited.
    pub(crate) fn room(&self) -> Result<Option<u64>, JobError> {
        match self {
            Self::Nbd { client, .. } => Ok(Some(client.info().size)),
            Self::File { storage, path, kind: FileKind::BlockDevice, .. } => {
                storage.len().map(Some).map_err(|error| file_error("look at", path, None, &error))
            }
            Self::Image { image, .. } => Ok(Some(image.size())),
            _ => Ok(None),
        }
    }

    /// Returns the alignment of requests, in bytes; a power of two.
    pub(crate) fn alignment(&self) -> u64 {
        match self {
            Self::Nbd { client, .. } => u64::from(client.info().minimum_block_size()),
            _ => 1,
        }
    }

    /// Returns whether the destination reads as zero where nothing was written.
    pub(crate) fn is_zero(&self) -> bool {
        matches!(
            self,
            Self::File { kind: FileKind::Regular, .. }
                | Self::Image { background: Background::Zero, .. }
                | Self::Null
        )
    }

    /// Writes data.
    pub(crate) async fn write(&self, offset: u64, data: Bytes) -> Result<(), JobError> {
        match self {
            Self::Nbd { client, uri } => client
                .write(offset, data, Durability::Cached)
                .await
                .map_err(|error| JobError::destination(failed(uri, "write to", &error))),
            Self::File { storage, path, writer, .. } => {
                let storage = storage.clone();
                let written = writer.write(storage, offset, data).await?;
                written.map_err(|error| file_error("write to", path, Some(offset), &error))
            }
            Self::Image { image, writers, .. } => {
                let _permit = writers.acquire().await;
                let image = image.clone();
                let at = GuestOffset::new(offset);
                blocking_image(move || image.write_at(at, &data, imgfmt::Durability::Cached)).await
            }
            Self::Standard | Self::Null => Ok(()),
        }
    }

    /// Makes a range zero.
    pub(crate) async fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<(), JobError> {
        match self {
            Self::Nbd { client, uri } => {
                if !client.info().flags.contains(TransmissionFlags::SEND_WRITE_ZEROES) {
                    return self.write_zero_buffers(offset, length).await;
                }
                let range = offset..offset + length;
                let zeroed = client.write_zeroes(range, mode, Speed::Any, Durability::Cached).await;
                match zeroed {
                    // Some servers advertise it and then refuse it (nbdkit in oldstyle does).
                    Err(error) if matches!(error.errno(), Some(Errno::EINVAL | Errno::ENOTSUP)) => {
                        self.write_zero_buffers(offset, length).await
                    }
                    zeroed => zeroed.map_err(|error| {
                        JobError::destination(failed(uri, "write zeroes to", &error))
                    }),
                }
            }
            Self::File { storage, path, kind, writer, .. } => {
                let storage = storage.clone();
                let at = HostOffset::new(offset);
                let mode = image_mode(mode);
                let kind = *kind;
                let zero = move || {
                    if kind == FileKind::Regular {
                        let end = offset.saturating_add(length);
                        if storage.len()? < end {
                            storage.set_len(end)?;
                        }
                    }
                    storage.write_zeroes(at, length, mode, imgfmt::Speed::Any)
                };
                let zeroed = writer.alone(zero).await?;
                zeroed.map_err(|error| file_error("write zeroes to", path, Some(offset), &error))
            }
            Self::Image { image, writers, .. } => {
                let _permit = writers.acquire().await;
                let image = image.clone();
                let range = GuestRange::new(GuestOffset::new(offset), length)
                    .ok_or_else(|| JobError::destination("a range goes beyond 2^63 bytes"))?;
                let mode = image_mode(mode);
                let (speed, durability) = (imgfmt::Speed::Any, imgfmt::Durability::Cached);
                blocking_image(move || image.write_zeroes(range, mode, speed, durability)).await
            }
            Self::Standard | Self::Null => Ok(()),
        }
    }

    async fn write_zero_buffers(&self, offset: u64, length: u64) -> Result<(), JobError> {
        let mut at = offset;
        let end = offset.saturating_add(length);
        while at < end {
            let part = (end - at).min(ZEROES.len() as u64);
            // Fits: it is at most the length of the static.
            let data = Bytes::from_static(&ZEROES[..part as usize]);
            Box::pin(self.write(at, data)).await?;
            at += part;
        }
        Ok(())
    }

    /// Sets the size of a regular file whose zero end was not written.
    pub(crate) fn set_size(&self, size: u64) -> Result<(), JobError> {
        match self {
            Self::File { storage, path, kind: FileKind::Regular, .. } => storage
                .set_len(size)
                .map_err(|error| file_error("set the size of", path, None, &error)),
            _ => Ok(()),
        }
    }

    /// Makes everything durable if requested.
    pub(crate) async fn finish(&self, flush: bool) -> Result<(), JobError> {
        if !flush {
            return Ok(());
        }
        match self {
            Self::Nbd { client, uri } => {
                if !client.info().flags.contains(TransmissionFlags::SEND_FLUSH) {
                    return Err(JobError::destination(format!(
                        "{uri} cannot flush, so that the copy is complete but may not be durable; \
                         leave out --flush"
                    )));
                }
                let flushed = client.flush().await;
                flushed.map_err(|error| JobError::destination(failed(uri, "flush", &error)))
            }
            Self::File { storage, path, .. } => {
                let storage = storage.clone();
                let flushed = tasks::spawn_blocking(move || storage.sync()).await;
                flushed
                    .map_err(|error| JobError::given_up("flush", &error))?
                    .map_err(|error| file_error("flush", path, None, &error))
            }
            Self::Image { image, .. } => {
                let image = image.clone();
                blocking_image(move || image.flush()).await
            }
            Self::Standard | Self::Null => Ok(()),
        }
    }

    /// Gives a complete new file its name, and makes a device expose its contents.
    pub(crate) fn complete(&self, durable: Durable) -> Result<(), JobError> {
        let Self::File { new, path, device, .. } = self else { return Ok(()) };
        if let Some(disk) = device {
            return device::complete_disk(path, disk);
        }
        match new.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(new) => new.complete(durable),
            None => Ok(()),
        }
    }

    /// Returns the device that is written to, if it is one.
    pub(crate) fn device(&self) -> Option<Arc<Unfinished>> {
        match self {
            Self::File { device, .. } => device.clone(),
            _ => None,
        }
    }

    /// Discards an incomplete new file; describes what remains.
    pub(crate) fn abandon(&self) -> Option<String> {
        let Self::File { new, .. } = self else { return None };
        let new = new.lock().unwrap_or_else(PoisonError::into_inner).take();
        new.map(|new| new.left_behind())
    }

    /// A new file with a temporary name, which the caller renames.
    pub(crate) fn new_file(new: &NewFile) -> Result<Self, JobError> {
        let storage =
            FileStorage::open(new.path(), Access::ReadWrite, Locking::Auto).map_err(image_error)?;
        Ok(Self::regular(storage, new.path(), None))
    }

    fn regular(storage: FileStorage, path: &Path, new: Option<NewFile>) -> Self {
        Self::File {
            storage: Arc::new(storage.written_once(Backlog::Limited)),
            path: path.to_owned(),
            kind: FileKind::Regular,
            device: None,
            new: Mutex::new(new),
            writer: Writer::default(),
        }
    }

    fn block_device(path: &Path, locking: Locking) -> Result<Self, JobError> {
        let disk = device::begin_disk(path, locking, CacheMode::default())?;
        Ok(Self::File {
            storage: disk.clone(),
            path: path.to_owned(),
            kind: FileKind::BlockDevice,
            device: Some(disk),
            new: Mutex::new(None),
            writer: Writer::default(),
        })
    }

    /// Closes an image; only then is it complete.
    pub(crate) fn close_image(self) -> Result<(), JobError> {
        let Self::Image { image, .. } = self else { return Ok(()) };
        let image = Arc::into_inner(image)
            .ok_or_else(|| JobError::destination("a write to the image has not ended"))?;
        image.close().map_err(image_error)
    }

    /// Ends the connection.
    pub(crate) async fn close(&self) {
        if let Self::Nbd { client, .. } = self {
            // Every write was answered, so the way in which the connection ends does not matter.
            let _ = client.clone().disconnect().await;
        }
    }
}

fn image_mode(mode: ZeroMode) -> imgfmt::ZeroMode {
    match mode {
        ZeroMode::MayUnmap => imgfmt::ZeroMode::MayUnmap,
        ZeroMode::KeepAllocated => imgfmt::ZeroMode::KeepAllocated,
    }
}

async fn blocking_image(
    work: impl FnOnce() -> imgfmt::Result<()> + Send + 'static,
) -> Result<(), JobError> {
    match lanes::blocking(work).await {
        Ok(result) => result.map_err(image_error),
        Err(error) => Err(JobError::given_up("write", &error)),
    }
}
