//! Opens described disks.

use std::path::Path;
use std::sync::Arc;

use imgfmt::storage::{NullStorage, StorageWindow, in_whole_blocks};
use imgfmt::{
    Access, BackingFile, BackingOptions, FileNames, Format, Image, Locking, NameTarget,
    OpenOptions, Storage,
};
use nbd_client::ExportStorage;
use nbd_server::export::filters::Window;

use super::description::{DescribedBacking, DiskDescription, DiskSource};
use crate::error::{JobError, JobErrorKind};
use crate::remote::Remotes;
use crate::serving::{OpenError, ServeOptions, Writes};

/// QEMU's block devices consist of these, in bytes.
const SECTOR: u64 = 512;

/// The name of an internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotName {
    /// An id or, if no snapshot has it, a name.
    IdOrName(String),
    /// The given ones must match.
    IdAndName {
        /// The id.
        id: Option<String>,
        /// The name.
        name: Option<String>,
    },
}

/// An open disk.
#[derive(Debug)]
#[non_exhaustive]
pub struct OpenedDisk {
    /// The disk.
    pub image: Image,
    /// The export of another server that the disk consists of, byte for byte.
    pub remote: Option<Arc<ExportStorage>>,
}

impl DiskDescription {
    /// Opens the disk. An export of it is made with the same `options`: their window is removed
    /// if the opened disk is that part of its storage already.
    ///
    /// Blocks: neither this nor dropping the image may happen in asynchronous tasks, because the
    /// image may be on another server.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if the disk cannot be opened.
    pub fn open(&self, options: &mut ServeOptions) -> Result<OpenedDisk, OpenError> {
        options.backing = backing_file(options, &self.backing)?;
        let has_window = self.storage_window != Window::default();
        if let DiskSource::File(path) = &self.source
            && !has_window
        {
            let image = options.open_image(path)?;
            let is_whole =
                image.size().is_multiple_of(SECTOR) && options.window.offset.is_multiple_of(SECTOR);
            if is_whole || !self.is_raw(path, options.names)? {
                return Ok(OpenedDisk { image, remote: None });
            }
            // Its locks would exclude us.
            drop(image);
        }
        let (storage, remote) = open_source(options, &self.source, Place::Top)?;
        let length = storage.len().map_err(at_source)?;
        let is_whole =
            !has_window && options.window == Window::default() && length.is_multiple_of(SECTOR);
        let storage = in_whole_blocks(storage, SECTOR).map_err(at_source)?;
        let mut storage = window_of(storage, self.storage_window)?;
        if options.format == Some(Format::Raw) {
            // Here, and not as a part of the disk: that could not end in the middle of a sector.
            storage = window_of(storage, std::mem::take(&mut options.window))?;
        }
        let image = options.open_storage(storage)?;
        Ok(OpenedDisk { image, remote: remote.filter(|_| is_whole) })
    }

    /// Returns whether a file is a raw image, regardless of the overlay above it.
    fn is_raw(&self, path: &Path, names: FileNames) -> imgfmt::Result<bool> {
        // This process holds the locks.
        let mut options = OpenOptions::new().locking(Locking::Off);
        (options.format, options.names) = (self.format, names);
        Ok(Image::inspect_file(path, &options)?.format == Format::Raw)
    }

    /// Returns the id of an internal snapshot.
    ///
    /// # Errors
    ///
    /// If the image cannot be read, or has no such snapshot.
    pub fn snapshot_id(
        &self,
        wanted: &SnapshotName,
        remotes: &Remotes,
    ) -> Result<String, JobError> {
        let mut options = OpenOptions::new()
            .access(Access::ReadOnly)
            .locking(self.settings.locking_or(Locking::Auto));
        options.format = self.format;
        let info = match (&self.source, self.storage_window == Window::default()) {
            (DiskSource::File(path), true) => Image::inspect_file(path, &options),
            (DiskSource::Export(uri), true) => Image::inspect_storage(remotes.open(uri)?, &options),
            _ => {
                return Err(JobError::invalid(
                    "-l (--load-snapshot) is supported for images that fill a file or an export",
                ));
            }
        };
        let info = info.map_err(|error| JobError::image(JobErrorKind::Source, error))?;
        let Some(qcow2) = info.qcow2 else {
            return Err(JobError::source(format!(
                "Failed to load snapshot: a {} image has none",
                info.format
            )));
        };
        let all = &qcow2.snapshots;
        let found = match wanted {
            SnapshotName::IdOrName(wanted) => all
                .iter()
                .find(|snapshot| snapshot.id == *wanted)
                .or_else(|| all.iter().find(|snapshot| snapshot.name == *wanted)),
            SnapshotName::IdAndName { id, name } => all.iter().find(|snapshot| {
                id.as_ref().is_none_or(|id| snapshot.id == *id)
                    && name.as_ref().is_none_or(|name| snapshot.name == *name)
            }),
        };
        let missing = || JobError::source("Failed to load snapshot: there is no such snapshot");
        Ok(found.ok_or_else(missing)?.id.clone())
    }
}

fn window_of(storage: Arc<dyn Storage>, window: Window) -> Result<Arc<dyn Storage>, JobError> {
    if window == Window::default() {
        return Ok(storage);
    }
    let whole = storage.len().map_err(at_source)?;
    window.check(whole).map_err(|error| JobError::invalid(error.to_string()))?;
    let inner = StorageWindow::new(storage, window.offset, window.size);
    inner.and_then(|inner| in_whole_blocks(Arc::new(inner), SECTOR)).map_err(at_source)
}

fn at_source(error: impl std::fmt::Display) -> JobError {
    JobError::source(error.to_string())
}

type OpenSource = (Arc<dyn Storage>, Option<Arc<ExportStorage>>);

/// Where a source is in a disk.
#[derive(Clone, Copy)]
enum Place {
    Top,
    /// It is a layer below.
    Below,
}

fn open_source(
    options: &ServeOptions,
    source: &DiskSource,
    place: Place,
) -> Result<OpenSource, OpenError> {
    Ok(match source {
        DiskSource::File(path) => (Arc::new(options.open_file(path)?), None),
        DiskSource::NamedAbove => {
            return Err(JobError::invalid("the image above has to be open").into());
        }
        DiskSource::Null { size, latency } => (Arc::new(NullStorage::new(*size, *latency)), None),
        DiskSource::Export(uri) => {
            let storage = match place {
                Place::Top => options.remotes.open(uri)?,
                Place::Below => {
                    // As for a layer that an image names: its server may be away for any time.
                    let connector = options.remotes.connector(uri).keep_reading();
                    Arc::new(options.remotes.open_with(connector)?)
                }
            };
            if options.writes == Writes::ToImage && !storage.is_writable() {
                return Err(JobError::source(format!("{uri} is exported read-only; add -r")).into());
            }
            (storage.clone(), Some(storage))
        }
    })
}

/// Opens what the options of a backing file describe.
pub(super) fn backing_file(
    options: &ServeOptions,
    backing: &DescribedBacking,
) -> Result<BackingFile, OpenError> {
    let disk = match backing {
        DescribedBacking::AsNamed => return Ok(BackingFile::AsNamed),
        DescribedBacking::Ignored => return Ok(BackingFile::Ignored),
        DescribedBacking::Given(disk) => disk,
    };
    // A part of a raw disk is a part of its file.
    let window = match disk.format {
        Some(Format::Raw) => disk.window,
        _ => disk.storage_window,
    };
    let whole = Window::default();
    disk.settings.check(Access::ReadOnly, options.cache).map_err(JobError::invalid)?;
    let cache = disk.settings.cache.applied_to(options.cache);
    let locking = disk.settings.locking_or(Locking::Auto);
    let mut opened = BackingOptions::default();
    opened.target = match &disk.source {
        DiskSource::NamedAbove if window == whole => None,
        DiskSource::NamedAbove => {
            let why = "a part of a backing file needs its name too (file.filename)";
            return Err(JobError::invalid(why).into());
        }
        DiskSource::File(path) if window == whole => Some(NameTarget::File(path.clone())),
        source => {
            let reading =
                ServeOptions { writes: Writes::Refused, locking, cache, ..options.clone() };
            let (storage, _) = open_source(&reading, source, Place::Below)?;
            let storage = in_whole_blocks(storage, SECTOR).map_err(at_source)?;
            Some(NameTarget::Storage(window_of(storage, window)?))
        }
    };
    opened.format = disk.format;
    opened.locking = Some(locking).filter(|locking| *locking != Locking::Auto);
    opened.cache = Some(cache);
    opened.encryption = disk.settings.encryption;
    opened.metadata_cache_bytes = disk.settings.metadata_cache;
    opened.backing = backing_file(options, &disk.backing)?;
    Ok(BackingFile::Given(Box::new(opened)))
}
