//! An image as an export, with the options of a server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use imgfmt::storage::FileStorage;
use imgfmt::{
    Access, BackingFile, BitmapDurability, BitmapState, CacheMode, ExpectedEncryption, FileNames,
    Format, Image, Locking, OpenOptions, OpenPolicy, Passphrase, Storage,
};
use nbd_server::export::filters::{FilterOptions, Window};
use nbd_server::export::{CountedLayers, Export, ImageExport};

use super::durability::{refuse_degraded, report_degraded, report_recovery};
use super::error::OpenError;
use super::patience::when_free;
use super::temporary::{temporary, temporary_over};
use crate::error::{JobError, JobErrorKind};
use crate::files::open_cached;
use crate::frozen_bits;
use crate::observer::{JobContext, Observer};
use crate::remote::{Remotes, allow_json_files};
use crate::text::printable;

/// The default directory of temporary overlays: not one in memory.
const TEMPORARY_DIRECTORY: &str = "/var/tmp";

/// The dirty bitmaps of an image that are offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OfferedBitmaps {
    /// All reliable ones; a warning gives the reason why others are not offered.
    All,
    /// These, all of which the image must have.
    Named(Vec<String>),
}

impl Default for OfferedBitmaps {
    fn default() -> Self {
        Self::Named(Vec::new())
    }
}

/// The destination of clients' writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Writes {
    /// None: the export is read-only.
    #[default]
    Refused,
    /// Into the image.
    ToImage,
    /// A temporary file that is removed when the server ends; the image is only read.
    ToTemporaryFile,
}

impl Writes {
    /// Returns the access to the image.
    pub(crate) fn access(self) -> Access {
        match self {
            Self::ToImage => Access::ReadWrite,
            Self::Refused | Self::ToTemporaryFile => Access::ReadOnly,
        }
    }
}

/// Options for opening and exporting an image; created by `default`, changed field by field.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ServeOptions {
    /// Receives warnings.
    pub context: JobContext,
    /// The directory of temporary overlays. By default it is /var/tmp.
    pub temporary_directory: Option<PathBuf>,
    /// Format of the image. By default it is detected.
    pub format: Option<Format>,
    /// What the name of the image's file says of it.
    pub names: FileNames,
    /// The name of what is not a file.
    pub(crate) known_as: Option<PathBuf>,
    /// An internal snapshot in place of the active state, which is read-only. By default none.
    pub snapshot: Option<String>,
    /// The destination of clients' writes.
    pub writes: Writes,
    /// The locking of files.
    pub locking: Locking,
    /// Time to wait for an image that another process uses. By default one second.
    pub patience: Option<Duration>,
    /// The use of the page cache, and the moment at which writes are durable.
    pub cache: CacheMode,
    /// Memory for the L2 tables of each qcow2 image, in bytes. By default that of
    /// [`OpenOptions`](imgfmt::OpenOptions).
    pub metadata_cache: Option<u64>,
    /// The treatment of the backing file that the image names.
    pub backing: BackingFile,
    /// The passphrases of encrypted layers. By default none.
    pub passphrases: Vec<Passphrase>,
    /// Whether a qcow2 image must be encrypted.
    pub encryption: ExpectedEncryption,
    /// Connects to re-exported servers.
    pub remotes: Remotes,
    /// The other files that the image may name. By default those in its directory.
    pub policy: Option<OpenPolicy>,
    /// Changes of requests.
    pub filter: FilterOptions,
    /// The part of the disk that is exported.
    pub window: Window,
    /// The failures that recording bitmaps must survive. Without it the default applies, and a
    /// lower durability is only a warning.
    pub bitmap_durability: Option<BitmapDurability>,
    /// Whether `qemu:allocation-depth` is offered.
    pub allocation_depth: bool,
    /// The layers that it counts.
    pub counted_layers: CountedLayers,
    /// The bitmaps that are offered.
    pub bitmaps: OfferedBitmaps,
}

/// An export and its image.
#[derive(Clone)]
#[non_exhaustive]
pub struct OpenedExport {
    /// The export.
    pub export: Arc<dyn Export>,
    /// The underlying image, if there is one.
    pub image: Option<Arc<ImageExport>>,
    /// What is served of the source: format, snapshot, part.
    pub(crate) view: String,
}

impl OpenedExport {
    /// Returns an export without an image.
    pub fn without_image(export: Arc<dyn Export>) -> Self {
        Self { export, image: None, view: String::new() }
    }
}

impl ServeOptions {
    /// Opens an image and makes an export of it.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if it cannot be opened.
    pub fn open(&self, path: &Path) -> Result<OpenedExport, OpenError> {
        let image = self.open_image(path)?;
        Ok(self.exported(image)?)
    }

    /// Opens an image without making an export of it.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if it cannot be opened.
    pub fn open_image(&self, path: &Path) -> Result<Image, OpenError> {
        let image = self.open_unlogged(path)?;
        let (cache, file) = (image.cache_mode(), printable(&path.to_string_lossy()));
        match image.direct_alignment() {
            Some(alignment) => tracing::info!(
                %file, %cache, offset_alignment = alignment.offset,
                memory_alignment = alignment.memory, "image opened for direct I/O"
            ),
            None => tracing::info!(%file, %cache, "image opened"),
        }
        Ok(image)
    }

    fn open_unlogged(&self, path: &Path) -> Result<Image, OpenError> {
        let options = self.options();
        match self.writes {
            Writes::ToTemporaryFile => {
                let directory = self.temporary_directory();
                if !self.passphrases.is_empty() {
                    let shown = printable(&directory.to_string_lossy());
                    self.context.observer.warning(&format!(
                        "what clients write to the encrypted disk is kept unencrypted in '{shown}' \
                         until the server ends"
                    ));
                }
                when_free(self.patience, || temporary(path, &options, directory))
            }
            // A snapshot never changes.
            Writes::ToImage if self.snapshot.is_none() => {
                let options = options.bitmap_durability(self.bitmap_durability.unwrap_or_default());
                let options = options.access(Access::ReadWrite);
                let image = when_free(self.patience, || Ok(Image::open(path, &options)?))?;
                let observer = &*self.context.observer;
                report_recovery(&image, path, observer);
                frozen_bits::report_thaw(&image, observer);
                match self.bitmap_durability {
                    Some(_) => refuse_degraded(&image, path)?,
                    None => report_degraded(&image, path, observer),
                }
                Ok(image)
            }
            Writes::ToImage | Writes::Refused => {
                when_free(self.patience, || Ok(Image::open(path, &options)?))
            }
        }
    }

    /// Opens the image in a storage.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if it cannot be opened.
    pub fn open_storage(&self, storage: Arc<dyn Storage>) -> Result<Image, OpenError> {
        let options = self.options();
        match self.writes {
            // A snapshot never changes.
            Writes::ToImage if self.snapshot.is_none() => {
                Ok(Image::from_storage(storage, &options.access(Access::ReadWrite))?)
            }
            Writes::ToImage | Writes::Refused => Ok(Image::from_storage(storage, &options)?),
            Writes::ToTemporaryFile => {
                temporary_over(Image::from_storage(storage, &options)?, self.temporary_directory())
            }
        }
    }

    /// Opens a file without interpreting it, for [`open_storage`](Self::open_storage).
    ///
    /// # Errors
    ///
    /// [`OpenError`] if it cannot be opened.
    pub fn open_file(&self, path: &Path) -> Result<FileStorage, OpenError> {
        let access = self.writes.access();
        let observer = &*self.context.observer;
        when_free(self.patience, || {
            Ok(open_cached(path, access, self.locking, self.cache, observer)?)
        })
    }

    fn temporary_directory(&self) -> &Path {
        self.temporary_directory.as_deref().unwrap_or(Path::new(TEMPORARY_DIRECTORY))
    }

    fn options(&self) -> OpenOptions {
        let mut options = OpenOptions::new().locking(self.locking).backing(self.backing.clone());
        options = options.cache(self.cache);
        let observer = self.context.observer.clone();
        options = options.on_unlocked(Arc::new(move |path: &Path| observer.unlocked(path)));
        options.policy = self.policy.clone().unwrap_or_else(|| allow_json_files(OpenPolicy::new()));
        (options.format, options.names) = (self.format, self.names);
        if let Some(name) = &self.known_as {
            options = options.known_as(name);
        }
        options.metadata_cache_bytes = self.metadata_cache;
        options.snapshot.clone_from(&self.snapshot);
        options.passphrases.clone_from(&self.passphrases);
        options.encryption = self.encryption;
        options
    }

    /// Makes an export of an open image.
    ///
    /// # Errors
    ///
    /// If the image does not contain the selected part.
    pub fn export(&self, image: Image) -> Result<Arc<dyn Export>, JobError> {
        Ok(self.exported(image)?.export)
    }

    pub(crate) fn exported(&self, image: Image) -> Result<OpenedExport, JobError> {
        self.exported_through(image, |export| export)
    }

    /// Like [`exported`](Self::exported), with an export put between the image and the filters.
    pub(super) fn exported_through(
        &self,
        image: Image,
        through: impl FnOnce(Arc<dyn Export>) -> Arc<dyn Export>,
    ) -> Result<OpenedExport, JobError> {
        let names = self.bitmaps.names(&image, &*self.context.observer)?;
        let view = self.view(&image);
        let observer = Arc::clone(&self.context.observer);
        let mut export = ImageExport::new(image).on_close_failure(move || observer.close_failed());
        if self.allocation_depth {
            export = export.with_allocation_depth_of(self.counted_layers);
        }
        for name in names {
            export = export.with_bitmap(&name).map_err(in_source)?;
        }
        let image = Arc::new(export);
        let part = self.window.apply(through(image.clone()));
        let part = part.map_err(|error| JobError::invalid(error.to_string()))?;
        let export = self.filter.apply(part);
        Ok(OpenedExport { export, image: Some(image), view })
    }

    /// What is served of the source, in words.
    fn view(&self, image: &Image) -> String {
        let mut view = match (&self.snapshot, self.writes) {
            (None, Writes::ToTemporaryFile) => "a temporary copy".to_owned(),
            (None, _) => format!("the disk in format {}", image.format()),
            (Some(snapshot), _) => format!("the snapshot '{snapshot}'"),
        };
        let Window { offset, size } = self.window;
        if offset > 0 || size.is_some() {
            let size = size.map_or_else(|| "all".to_owned(), |size| format!("{size} bytes"));
            view.push_str(&format!(" from offset {offset} on, {size}"));
        }
        view
    }
}

impl OfferedBitmaps {
    /// The names of the bitmaps of an image.
    fn names(&self, image: &Image, observer: &dyn Observer) -> Result<Vec<String>, JobError> {
        if let Self::Named(names) = self {
            names.iter().try_for_each(|name| frozen_bits::check_complete(image, name))?;
            return Ok(names.clone());
        }
        if let Some(damage) = image.bitmap_damage() {
            observer.warning(&format!("no bitmap is offered: {}", printable(&damage)));
        }
        let sound = image.bitmaps_of_chain().into_iter().filter(|bitmap| match &bitmap.state {
            BitmapState::Inconsistent { reason } | BitmapState::Damaged { reason } => {
                let (name, reason) = (printable(&bitmap.name), printable(reason));
                observer.warning(&format!("the bitmap '{name}' is not offered: {reason}"));
                false
            }
            _ => true,
        });
        let complete = sound.filter(|bitmap| {
            let complete = frozen_bits::check_complete(image, &bitmap.name);
            complete.inspect_err(|why| observer.warning(&format!("not offered: {why}"))).is_ok()
        });
        Ok(complete.map(|bitmap| bitmap.name).collect())
    }
}

fn in_source(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Source, error)
}
