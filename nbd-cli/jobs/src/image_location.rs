//! The locations of images: files, and exports of NBD servers.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgfmt::storage::Part;
use imgfmt::{Access, BackingFile, Error, Format, Image, ImageInfo, NameTarget, OpenOptions};
use nbd_client::blocking::Client;
use nbd_client::{ExportStorage, LocalFiles};
use nbd_proto::NbdUri;

use crate::error::{JobError, JobErrorKind};
use crate::key_values::KeyValues;
use crate::location::Location;
use crate::object::ObjectUrl;
use crate::qemu_name::{
    BackingInName, DriverSettings, ExportOptions, FormatInName, NameInImage, NamedImage, from_json,
    from_key_values, from_name_in_image, has_scheme, path_in,
};
use crate::remote::{Remotes, backing_file};
use crate::text::printable;

/// The option of `nbd-cli` that declares an image to be raw.
const RAW_OPTION: &str = "--format raw";

/// A file, or an export of a server.
#[derive(Clone, Debug)]
pub enum ImageLocation {
    /// A file.
    File(PathBuf),
    /// An export of a server.
    Export {
        /// The export.
        uri: NbdUri,
        /// Whether the URI may name files of this machine: only if it comes from the user, not from
        /// an image.
        files: LocalFiles,
    },
    /// An object of a store, which is read-only.
    Object(ObjectUrl),
    /// A file or export, with the format and the backing file that its name specifies.
    Described {
        /// The file or export.
        location: Box<Self>,
        /// The part of it in which the image is.
        part: Part,
        /// The format that the name specifies.
        format: FormatInName,
        /// The backing file that the name specifies.
        backing: BackingInName,
        /// How the name specifies that it is used.
        settings: DriverSettings,
    },
}

impl ImageLocation {
    /// Parses a path, the URI of an export, or one of QEMU's names: `json:OBJECT`, `file:PATH`,
    /// `nbd:HOST:PORT`.
    ///
    /// ```
    /// use imgfmt::{CreateOptions, Format, Image, OpenOptions};
    /// use nbd_jobs::image_location::ImageLocation;
    /// use nbd_jobs::remote::Remotes;
    ///
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("disk.qcow2");
    /// Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20))?;
    /// let location = ImageLocation::parse(path.as_os_str())?;
    /// let image = location.open(&OpenOptions::new(), &Remotes::default())?;
    /// assert_eq!(image.size(), 1 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If it is malformed, or means something else than an image.
    pub fn parse(word: &OsStr) -> Result<Self, JobError> {
        // File names need not be UTF-8; URIs must be.
        let Some(text) = word.to_str() else { return Ok(Self::File(path_in(word).into())) };
        if let Some(object) = text.strip_prefix("json:") {
            let named = from_json(object)
                .map_err(|why| JobError::invalid(format!("'{text}' cannot be used: {why}")))?;
            return Ok(Self::described(named, LocalFiles::Allowed));
        }
        match text.parse().map_err(JobError::invalid)? {
            Location::File(path) => Ok(Self::File(path)),
            Location::Nbd(uri) => Ok(Self::Export { uri, files: LocalFiles::Allowed }),
            Location::Object(url) => Ok(Self::Object(url)),
            Location::Standard | Location::Null => Err(JobError::invalid(format!(
                "'{text}' is not an image; give a file (./{text} if that is its name) or an NBD URI"
            ))),
        }
    }

    /// Parses the options of QEMU's drivers (`driver=qcow2,file.filename=disk.qcow2`), as in
    /// `--image-opts`.
    ///
    /// # Errors
    ///
    /// If they are malformed, or an option is not supported.
    pub fn from_options(text: &str) -> Result<Self, JobError> {
        let named = KeyValues::parse(text, None).and_then(from_key_values);
        let named =
            named.map_err(|why| JobError::invalid(format!("'{}': {why}", printable(text))))?;
        Ok(Self::described(named, LocalFiles::Allowed))
    }

    fn described(named: NamedImage, files: LocalFiles) -> Self {
        let NamedImage { name, part, format, backing, settings } = named;
        Self::Described {
            location: Box::new(Self::of(name, files)),
            part,
            format,
            backing,
            settings,
        }
    }

    fn of(name: NameInImage, files: LocalFiles) -> Self {
        match name {
            NameInImage::File(path) => Self::File(path),
            NameInImage::Export(uri) => Self::Export { uri: *uri, files },
        }
    }

    /// Returns the URI of an export.
    pub fn uri(&self) -> Option<&NbdUri> {
        match self {
            Self::File(_) | Self::Object(_) => None,
            Self::Export { uri, .. } => Some(uri),
            Self::Described { location, .. } => location.uri(),
        }
    }

    /// Returns whether the image is not a file of this machine.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        match self {
            Self::File(_) => false,
            Self::Export { .. } | Self::Object(_) => true,
            Self::Described { location, .. } => location.is_remote(),
        }
    }

    /// Returns the ids of the secrets that its name gives for it and for the described images
    /// below.
    pub fn key_secrets(&self) -> Vec<&str> {
        let Self::Described { backing, settings, .. } = self else { return Vec::new() };
        let below = backing.described().map(|image| &image.settings);
        let all = std::iter::once(settings).chain(below);
        all.filter_map(|settings| settings.key_secret.as_deref()).collect()
    }

    /// Resolves the credentials of TLS in its name, for it and for the described images below:
    /// `secure` adds those of an id to the URI of their export.
    ///
    /// # Errors
    ///
    /// Those of `secure`.
    pub fn resolve_credentials(
        &mut self,
        secure: &dyn Fn(&str, &mut NbdUri) -> Result<(), String>,
    ) -> Result<(), String> {
        let resolve = |uri: &mut NbdUri, options: &mut ExportOptions| match options.tls_creds.take()
        {
            None => Ok(()),
            Some(id) => {
                uri.tls.hostname = options.tls_hostname.take();
                secure(&id, uri)
            }
        };
        let Self::Described { location, backing, settings, .. } = self else { return Ok(()) };
        if let Self::Export { uri, .. } = &mut **location {
            resolve(uri, &mut settings.export)?;
        }
        let mut next = backing;
        while let BackingInName::Given(given) = next {
            if let Some(NameInImage::Export(uri)) = &mut given.name {
                resolve(uri, &mut given.settings.export)?;
            }
            next = &mut given.backing;
        }
        Ok(())
    }

    /// Removes the context of the option `x-dirty-bitmap` from its name.
    pub fn take_dirty_bitmap(&mut self) -> Option<String> {
        match self {
            Self::Described { settings, .. } => settings.export.dirty_bitmap.take(),
            _ => None,
        }
    }

    /// Returns the file or export, and the options with the format and the backing file that its
    /// name specifies.
    ///
    /// # Errors
    ///
    /// If the options contradict it.
    pub fn settled(
        &self,
        options: &OpenOptions,
        remotes: &Remotes,
    ) -> Result<(&Self, OpenOptions), JobError> {
        let mut options = options.clone();
        let Self::Described { location, part, format, backing, settings } = self else {
            return Ok((self, options));
        };
        options.part = *part;
        match (format, options.format) {
            (FormatInName::Said(said), Some(given)) if *said != given => {
                return Err(JobError::invalid(format!(
                    "the name of {location} says that it is a {said} image, and the option for its \
                     format says {given}; leave one of them out"
                )));
            }
            (FormatInName::Said(said), _) => options.format = Some(*said),
            (FormatInName::Bytes, None) => options.format = Some(Format::Raw),
            (FormatInName::Bytes | FormatInName::Unsaid, _) => {}
        }
        settings
            .apply_to(&mut options)
            .and_then(|()| backing.check(options.cache))
            .map_err(|why| JobError::not_opened(location.name(), location, why))?;
        if !matches!(options.backing, BackingFile::Ignored) {
            let files = location.local_files();
            let target = |name| Self::of(name, files).target(remotes);
            options.backing = backing_file(backing.clone(), &target)?;
        }
        Ok((location, options))
    }

    /// Returns information about the image; the files and exports that it names are not opened.
    ///
    /// # Errors
    ///
    /// If the image cannot be read, or `options` contradict its name.
    pub fn inspect(&self, options: &OpenOptions, remotes: &Remotes) -> Result<ImageInfo, JobError> {
        let (location, options) = self.settled(options, remotes)?;
        match location {
            Self::Export { uri, files } => {
                let storage = connect_to(uri, *files, remotes)?;
                Image::inspect_storage(storage, &remotes.for_export(&options))
                    .map_err(|error| self.named(JobErrorKind::Source, error))
            }
            Self::Object(url) => {
                Image::inspect_storage(remotes.open_object(url)?, &url.options(&options))
                    .map_err(|error| self.named(JobErrorKind::Source, error))
            }
            file => Image::inspect_file(file.path(), &options).map_err(opening),
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
        match location {
            Self::Export { uri, files } => {
                let storage = connect_to(uri, *files, remotes)?;
                Image::inspect_storage_chain(storage, &remotes.for_export(&options))
                    .map_err(|error| opening(error.with_path(uri.to_string())))
            }
            Self::Object(url) => {
                Image::inspect_storage_chain(remotes.open_object(url)?, &url.options(&options))
                    .map_err(|error| opening(error.with_path(url.to_string())))
            }
            file => Image::inspect_chain(file.path(), &options).map_err(opening),
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
        let storage = connect_to(uri, *files, remotes)?;
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
                let storage = connect_to(uri, *files, remotes)?;
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
        let storage = connect_to(uri, *files, remotes)?;
        match storage.is_writable() {
            true => Ok(storage),
            false => Err(JobError::invalid(format!(
                "cannot write to {uri}: the server exports this disk read-only"
            ))),
        }
    }

    /// Returns the name of the file or the URI.
    pub fn name(&self) -> String {
        match self {
            Self::File(path) => path.to_string_lossy().into_owned(),
            Self::Export { uri, .. } => uri.to_string(),
            Self::Object(url) => url.to_string(),
            Self::Described { location, .. } => match &**location {
                // As in QEMU, the options that are not the address of the export are left out.
                Self::Export { uri, .. } => {
                    NbdUri::new(uri.transport.clone(), uri.export_name.clone()).to_string()
                }
                location => location.name(),
            },
        }
    }

    /// Returns the path of the file; empty for an export.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Export { .. } | Self::Object(_) => Path::new(""),
            Self::Described { location, .. } => location.path(),
        }
    }

    /// Resolves a name in the image: relative names start at its directory.
    ///
    /// # Errors
    ///
    /// If it is a malformed name of a server.
    pub fn beside(&self, name: &OsStr) -> Result<Self, JobError> {
        if let Some(url) = name.to_str().and_then(ObjectUrl::of) {
            url.refuse_moving().map_err(|error| JobError::invalid(error.to_string()))?;
            return Ok(Self::Object(url));
        }
        if let Some(name) = name.to_str().filter(|name| has_scheme(name)) {
            let NamedImage { name, part, backing, .. } =
                from_name_in_image(name).map_err(JobError::invalid)?;
            return Ok(match backing {
                BackingInName::AsNamed if part.is_whole() => Self::of(name, LocalFiles::Refused),
                // The image records the format.
                backing => {
                    let named = NamedImage { part, backing, ..NamedImage::from(name) };
                    Self::described(named, LocalFiles::Refused)
                }
            });
        }
        Ok(Self::File(match (self.uri(), path_in(name)) {
            (None, path) if path.as_os_str() == name => beside(self.path(), name),
            // As in QEMU, a name with a scheme starts at the working directory.
            (_, path) => path.to_owned(),
        }))
    }

    /// Returns the backing file of the image, in which `recorded` is its name.
    ///
    /// # Errors
    ///
    /// As [`beside`](Self::beside).
    pub fn backing(&self, recorded: Option<&OsStr>) -> Result<Option<Self>, JobError> {
        let named = || recorded.map(|name| self.beside(name)).transpose();
        let given = match self {
            Self::Described { backing: BackingInName::Ignored, .. } => return Ok(None),
            Self::Described { backing: BackingInName::Given(given), .. } => given,
            _ => return named(),
        };
        let location = match &given.name {
            Some(name) => Some(Self::of(name.clone(), self.local_files())),
            None => named()?,
        };
        Ok(location.map(|location| Self::Described {
            location: Box::new(location),
            part: given.part,
            format: FormatInName::Unsaid,
            backing: given.backing.clone(),
            settings: given.settings.clone(),
        }))
    }

    /// Returns whether a URI in this image may name files of this machine: if its own may.
    pub(crate) fn local_files(&self) -> LocalFiles {
        match self {
            Self::File(_) => LocalFiles::Allowed,
            // An image from elsewhere.
            Self::Object(_) => LocalFiles::Refused,
            Self::Export { files, .. } => *files,
            Self::Described { location, .. } => location.local_files(),
        }
    }

    /// Returns the file, or the opened export.
    fn target(self, remotes: &Remotes) -> Result<NameTarget, JobError> {
        match self {
            Self::Export { uri, files } => {
                Ok(NameTarget::Storage(connect_to(&uri, files, remotes)?))
            }
            Self::Object(url) => Ok(NameTarget::Storage(remotes.open_object(&url)?)),
            file => Ok(NameTarget::File(file.path().to_owned())),
        }
    }

    /// Returns the error, of this kind, with the name of this image, if it has none yet.
    pub fn named(&self, kind: JobErrorKind, error: Error) -> JobError {
        match self.is_remote() {
            false => JobError::image(kind, error),
            true => JobError::image(kind, error.with_path(self.name())),
        }
    }
}

/// Connects to an export as storage.
///
/// # Errors
///
/// If the server cannot be reached or refuses.
pub fn connect_to(
    uri: &NbdUri,
    files: LocalFiles,
    remotes: &Remotes,
) -> Result<Arc<ExportStorage>, JobError> {
    match files {
        LocalFiles::Allowed => remotes.open(uri),
        LocalFiles::Refused => remotes.open_named_by_image(uri).map(Arc::new),
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

/// Returns the path of a file that an image names: relative names start at the image's directory.
fn beside(image: &Path, name: &OsStr) -> PathBuf {
    match image.parent() {
        Some(directory) => directory.join(name),
        None => PathBuf::from(name),
    }
}

impl fmt::Display for ImageLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "'{}'", path.display()),
            Self::Export { uri, .. } => uri.fmt(f),
            Self::Object(url) => url.fmt(f),
            Self::Described { location, .. } => location.fmt(f),
        }
    }
}
