//! The locations of images: files, and exports of NBD servers.

mod open;

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use imgfmt::storage::Part;
use imgfmt::{BackingFile, Error, Format, NameTarget, OpenOptions};
use nbd_client::LocalFiles;
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

pub(crate) use self::open::read_only;

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
            Self::Export { uri, files } => Ok(NameTarget::Storage(remotes.connect(&uri, files)?)),
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
