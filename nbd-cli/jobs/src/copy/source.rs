//! The source of a copy.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use imgfmt::storage::{FileIdentity, FileStorage};
use imgfmt::{
    Access, ExtentKind, Format, GuestOffset, GuestRange, HostOffset, Image, Locking, OpenOptions,
    Storage as _, TryRead,
};
use nbd_client::{Client, ReadChunk, ReadMemory};
use nbd_proto::NbdUri;
use nbd_proto::wire::MetaContextName;

use super::content::{Content, allocated};
use super::options::Knowledge;
use super::plan::{Extents, ImageExtents};
use crate::connect::{self, ConnectOptions, failed};
use crate::error::{JobError, JobErrorKind};
use crate::files::open_file;
use crate::lanes::is_lane;
use crate::location::Location;
use crate::object::ObjectUrl;
use crate::observer::JobContext;
use crate::target::stacked::share_data;
use crate::tasks;

/// Standard input, if it is a file.
const STANDARD: &str = "/proc/self/fd/0";

/// An open source. Clones refer to the same one.
#[derive(Clone)]
pub(crate) enum Source {
    Nbd {
        client: Client,
        uri: NbdUri,
    },
    File {
        storage: Arc<FileStorage>,
        path: PathBuf,
        size: u64,
    },
    /// A disk in an image format.
    Image {
        image: Arc<Image>,
        /// Size of the disk in bytes: that of the image, or less.
        size: u64,
    },
    /// Standard input: read once, front to back, of unknown size.
    Standard,
    Null,
}

impl Source {
    /// Opens the disk in an image. The size recorded by a backup is exact; that of the image is a
    /// multiple of 512.
    pub(crate) fn image(image: Arc<Image>) -> Self {
        let backup = image.backups_of_chain().into_iter().next().and_then(|(_, backup)| backup);
        let disk_size = backup.map(|backup| backup.identity.disk_size);
        let is_own = |size: &u64| size.next_multiple_of(512) == image.size();
        let size = disk_size.filter(is_own).unwrap_or_else(|| image.size());
        Self::Image { image, size }
    }

    /// Opens a server's export or a file for reading.
    pub(crate) async fn open(
        location: &Location,
        connect: &ConnectOptions,
        locking: Locking,
        knowledge: Knowledge,
        context: &JobContext,
    ) -> Result<Self, JobError> {
        match location {
            Location::Nbd(uri) => {
                let mut connector = connect.connector(uri);
                if knowledge == Knowledge::Holes {
                    connector = connector.meta_contexts([MetaContextName::base_allocation()]);
                }
                let whose = JobErrorKind::Source;
                let client =
                    connect::connect(&connector, uri, whose, &context.cancellation).await?;
                Ok(Self::Nbd { client, uri: uri.clone() })
            }
            Location::File(path) => {
                let storage = open_file(path, Access::ReadOnly, locking, &*context.observer)
                    .map_err(|error| JobError::image(JobErrorKind::Source, error))?;
                let size = storage.len().map_err(|error| read_error(path, 0, &error))?;
                Ok(Self::File { storage: Arc::new(storage), path: path.clone(), size })
            }
            Location::Object(url) => object(url, connect).await,
            Location::Standard => Ok(Self::Standard),
            Location::Null => Ok(Self::Null),
        }
    }

    /// Returns the size in bytes, if it is known beforehand.
    pub(crate) fn size(&self) -> Option<u64> {
        match self {
            Self::Nbd { client, .. } => Some(client.info().size),
            Self::File { size, .. } => Some(*size),
            Self::Image { size, .. } => Some(*size),
            Self::Standard => None,
            Self::Null => Some(0),
        }
    }

    /// Returns the files that are read.
    pub(crate) fn files(&self) -> Vec<FileIdentity> {
        match self {
            Self::File { storage, .. } => storage.identity().into_iter().collect(),
            Self::Image { image, .. } => image.files().into_iter().map(|(_, file)| file).collect(),
            Self::Standard => FileIdentity::of(Path::new(STANDARD)).into_iter().collect(),
            Self::Nbd { .. } | Self::Null => Vec::new(),
        }
    }

    /// Returns whether a change of this file may change what is read, for example through a device
    /// that is stacked on it.
    pub(super) fn is_on(&self, file: FileIdentity) -> bool {
        self.files().into_iter().any(|own| share_data(own, file))
    }

    /// Returns the alignment of requests, in bytes; a power of two.
    pub(crate) fn alignment(&self) -> u64 {
        match self {
            Self::Nbd { client, .. } => u64::from(client.info().minimum_block_size()),
            _ => 1,
        }
    }

    /// Returns the information about holes from `start` (in bytes) on.
    pub(crate) fn extents(&self, start: u64) -> Extents {
        match self {
            Self::Nbd { client, .. } => {
                let context = MetaContextName::base_allocation();
                if client.meta_contexts().contains(&context) {
                    Extents::Server(client.extents(&context, start..client.info().size))
                } else {
                    Extents::Unknown
                }
            }
            Self::File { storage, .. } => Extents::File(storage.clone()),
            Self::Image { image, .. } => Extents::Image(ImageExtents::new(image, start)),
            Self::Standard | Self::Null => Extents::Unknown,
        }
    }

    /// Reads a part of the disk, into memory of an earlier part, of any length and content.
    pub(crate) async fn read(
        &self,
        offset: u64,
        length: u64,
        mut buffer: BytesMut,
    ) -> Result<Bytes, JobError> {
        // Lengths are at most the request size.
        let length = length as usize;
        match self {
            Self::Nbd { client, uri } => {
                let read = client.read_reusing(offset..offset + length as u64, buffer).await;
                read.map_err(|error| JobError::source(failed(uri, "read from", &error)))
            }
            Self::File { storage, path, .. } => {
                let at = HostOffset::new(offset);
                if is_lane() {
                    buffer.resize(length, 0);
                    if let Ok(TryRead::Complete) = storage.try_read_at(at, &mut buffer) {
                        return Ok(buffer.freeze());
                    }
                }
                let storage = storage.clone();
                let reading = tasks::spawn_blocking(move || {
                    buffer.resize(length, 0);
                    let read = storage.read_exact_at(at, &mut buffer);
                    read.map(|()| buffer.freeze())
                });
                match reading.await {
                    Ok(read) => read.map_err(|error| read_error(path, offset, &error)),
                    Err(error) => Err(JobError::given_up("read", &error)),
                }
            }
            Self::Image { image, .. } => {
                let at = GuestOffset::new(offset);
                if is_lane() {
                    buffer.resize(length, 0);
                    if let Ok(TryRead::Complete) = image.try_read_at(at, &mut buffer) {
                        return Ok(buffer.freeze());
                    }
                }
                let image = image.clone();
                let reading = tasks::spawn_blocking(move || {
                    buffer.resize(length, 0);
                    let read = image.read_at(at, &mut buffer);
                    read.map(|()| buffer.freeze())
                });
                match reading.await {
                    Ok(read) => read.map_err(|error| JobError::image(JobErrorKind::Source, error)),
                    Err(error) => Err(JobError::given_up("read", &error)),
                }
            }
            Self::Standard | Self::Null => {
                Err(JobError::source("this source cannot be read at an offset"))
            }
        }
    }

    /// Like [`read`](Self::read), with the holes that a server reports in its answer.
    pub(super) async fn read_chunks(
        &self,
        offset: u64,
        length: u64,
        memory: &ReadMemory,
    ) -> Result<Vec<ReadChunk>, JobError> {
        let Self::Nbd { client, uri } = self else {
            let data = self.read(offset, length, memory.take_used()).await?;
            return Ok(vec![ReadChunk::Data { offset, data }]);
        };
        let read = client.read_chunks_into(offset..offset + length, memory).await;
        read.map_err(|error| JobError::source(failed(uri, "read from", &error)))
    }

    /// Returns whether a range is known to be zero without reading it; false if unknown.
    pub(super) async fn is_known_zero(&self, offset: u64, length: u64) -> bool {
        let end = offset.saturating_add(length);
        match self {
            Self::Image { image, .. } => {
                let image = image.clone();
                let look = move || is_zero_in_image(&image, offset, end);
                tasks::spawn_blocking(look).await.unwrap_or(false)
            }
            Self::Nbd { client, .. } => {
                let context = MetaContextName::base_allocation();
                if !client.meta_contexts().contains(&context) {
                    return false;
                }
                let mut extents = client.extents(&context, offset..end);
                loop {
                    match extents.next().await {
                        None => return true,
                        Some(Ok(extent)) if allocated(&extent) == Content::Zero => {}
                        Some(_) => return false,
                    }
                }
            }
            Self::File { storage, .. } => storage
                .next_extent(HostOffset::new(offset), length)
                .is_ok_and(|found| found.kind != ExtentKind::Data && found.length >= length),
            Self::Standard | Self::Null => false,
        }
    }

    /// Ends the connection.
    pub(crate) async fn close(&self) {
        if let Self::Nbd { client, .. } = self {
            // Everything was read, so the way in which the connection ends does not matter.
            let _ = client.clone().disconnect().await;
        }
    }
}

/// Opens the bytes of an object.
async fn object(url: &ObjectUrl, connect: &ConnectOptions) -> Result<Source, JobError> {
    let (url, objects) = (url.clone(), connect.objects.clone());
    let opening = tasks::spawn_blocking(move || {
        let storage = objects.open(&url).map_err(|error| JobError::source(error.to_string()))?;
        let size = storage.len().map_err(|error| JobError::source(error.to_string()))?;
        let image = Image::from_storage(storage, &OpenOptions::new().format(Format::Raw));
        let image = image.map_err(|error| {
            JobError::image(JobErrorKind::Source, error.with_path(url.to_string()))
        })?;
        Ok(Source::Image { image: Arc::new(image), size })
    });
    opening.await.unwrap_or_else(|error| Err(JobError::given_up("open", &error)))
}

fn is_zero_in_image(image: &Image, offset: u64, end: u64) -> bool {
    let range = GuestRange::between(GuestOffset::new(offset), GuestOffset::new(end));
    range.is_some_and(|range| {
        let is_zero = |extent: imgfmt::Extent| extent.kind != ExtentKind::Data;
        image.extents(range).all(|extent| extent.is_ok_and(is_zero))
    })
}

fn read_error(path: &Path, offset: u64, error: &std::io::Error) -> JobError {
    let why = match error.kind() {
        std::io::ErrorKind::UnexpectedEof => "the file has become shorter".to_owned(),
        _ => error.to_string(),
    };
    JobError::source(format!("cannot read '{}' at offset {offset}: {why}", path.display()))
}
