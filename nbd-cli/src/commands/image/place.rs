//! The disks of a command: files, and exports of NBD servers.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgfmt::{Access, Error, Format, Image, ImageInfo, NameTarget, OpenOptions};
use nbd_client::blocking::Client;
use nbd_client::{ExportStorage, LocalFiles};
use nbd_jobs::Location;
use nbd_jobs::qemu_name::{
    BackingInName, FormatInName, NameInImage, NamedImage, from_json, from_name_in_image,
    has_scheme, path_in,
};
use nbd_jobs::remote::backing_file;
use nbd_proto::NbdUri;

use super::open::{TrustArgs, beside, explained, explained_with};
use crate::connect::ServerArgs;
use crate::error::CommandError;

/// A file, or an export of a server.
#[derive(Clone, Debug)]
pub(in crate::commands) enum ImageLocation {
    File(PathBuf),
    /// The URI may name files of this machine only if it comes from the user, not from an image.
    Export {
        uri: NbdUri,
        files: LocalFiles,
    },
    /// A file or export, with the format and the backing file that its name specifies.
    Described {
        place: Box<Self>,
        format: FormatInName,
        backing: BackingInName,
    },
}

impl ImageLocation {
    /// Parses a command line argument.
    fn parse(word: &OsStr) -> Result<Self, CommandError> {
        // File names need not be UTF-8; URIs must be.
        let Some(text) = word.to_str() else { return Ok(Self::File(path_in(word).into())) };
        if let Some(object) = text.strip_prefix("json:") {
            let NamedImage { name, format, backing } = from_json(object)
                .map_err(|why| CommandError::new(format!("'{text}' cannot be used: {why}")))?;
            let place = Box::new(Self::of(name, LocalFiles::Allowed));
            return Ok(Self::Described { place, format, backing });
        }
        match text.parse().map_err(CommandError::new)? {
            Location::File(path) => Ok(Self::File(path)),
            Location::Nbd(uri) => Ok(Self::Export { uri, files: LocalFiles::Allowed }),
            Location::Standard | Location::Null => Err(CommandError::new(format!(
                "'{text}' is not an image; give a file (./{text} if that is its name) or an NBD URI"
            ))),
        }
    }

    fn of(name: NameInImage, files: LocalFiles) -> Self {
        match name {
            NameInImage::File(path) => Self::File(path),
            NameInImage::Export(uri) => Self::Export { uri: *uri, files },
        }
    }

    /// Parses a command line argument; the options for servers must apply to it, or to servers that
    /// it may name.
    pub(in crate::commands) fn parse_one(
        word: &OsStr,
        server: &ServerArgs,
        trust: &TrustArgs,
    ) -> Result<Self, CommandError> {
        let place = Self::parse(word)?;
        if !trust.trust_image {
            server.check(place.uri())?;
        }
        Ok(place)
    }

    /// Parses a command line argument, for a command that opens no other files.
    pub(super) fn parse_alone(word: &OsStr, server: &ServerArgs) -> Result<Self, CommandError> {
        let place = Self::parse(word)?;
        server.check(place.uri())?;
        Ok(place)
    }

    /// Parses two command line arguments; the options for servers must apply to one of them, or to
    /// servers that it may name.
    pub(super) fn parse_two(
        words: [&OsStr; 2],
        server: &ServerArgs,
        trust: &TrustArgs,
    ) -> Result<[Self; 2], CommandError> {
        let places = [Self::parse(words[0])?, Self::parse(words[1])?];
        if !trust.trust_image {
            server.check(places.iter().filter_map(Self::uri))?;
        }
        Ok(places)
    }

    pub(super) fn uri(&self) -> Option<&NbdUri> {
        match self {
            Self::File(_) => None,
            Self::Export { uri, .. } => Some(uri),
            Self::Described { place, .. } => place.uri(),
        }
    }

    /// Returns the file or export, and the options with the format and the backing file that its
    /// name specifies.
    ///
    /// # Errors
    ///
    /// If the options contradict it.
    pub(super) fn settled(
        &self,
        options: &OpenOptions,
        server: &ServerArgs,
    ) -> Result<(&Self, OpenOptions), CommandError> {
        let mut options = options.clone();
        let Self::Described { place, format, backing } = self else { return Ok((self, options)) };
        match (format, options.format) {
            (FormatInName::Said(said), Some(given)) if *said != given => {
                return Err(CommandError::new(format!(
                    "the name of {place} says that it is a {said} image, and the option for its \
                     format says {given}; leave one of them out"
                )));
            }
            (FormatInName::Said(said), _) => options.format = Some(*said),
            (FormatInName::Bytes, None) => options.format = Some(Format::Raw),
            (FormatInName::Bytes | FormatInName::Unsaid, _) => {}
        }
        let files = place.local_files();
        let target = |name| Self::of(name, files).target(server);
        options.backing = backing_file(backing.clone(), &target)?;
        Ok((place, options))
    }

    /// Returns information about the image; the files and exports that it names are not opened.
    pub(in crate::commands) fn inspect(
        &self,
        options: &OpenOptions,
        server: &ServerArgs,
    ) -> Result<ImageInfo, CommandError> {
        let (place, options) = self.settled(options, server)?;
        match place {
            Self::Export { uri, files } => {
                let storage = storage(uri, *files, server)?;
                Image::inspect_storage(Arc::new(storage), &raw_unless_told(&options))
                    .map_err(|error| self.named(error))
            }
            file => Image::inspect_file(file.path(), &options).map_err(explained),
        }
    }

    /// Opens the image. An export is a raw image unless the options specify a format.
    pub(in crate::commands) fn open(
        &self,
        options: &OpenOptions,
        server: &ServerArgs,
    ) -> Result<Image, CommandError> {
        self.open_or_name(options, server, "--format raw")
    }

    /// Like [`open`](Self::open), and returns the export as well if it is the disk, byte for byte.
    pub(super) fn open_disk_or_image(
        &self,
        options: &OpenOptions,
        server: &ServerArgs,
    ) -> Result<(Image, Option<Arc<ExportStorage>>), CommandError> {
        let (place, options) = self.settled(options, server)?;
        let Self::Export { uri, files } = place else {
            return Ok((place.open(&options, server)?, None));
        };
        let storage = Arc::new(storage(uri, *files, server)?);
        let image = Image::from_storage(storage.clone(), &raw_unless_told(&options));
        let image = image.map_err(|error| explained(error.with_path(uri.to_string())))?;
        let is_raw = image.format() == Format::Raw;
        Ok((image, is_raw.then_some(storage)))
    }

    /// Like [`open`](Self::open), for a command with another option for the format of this image.
    pub(in crate::commands) fn open_or_name(
        &self,
        options: &OpenOptions,
        server: &ServerArgs,
        raw_option: &str,
    ) -> Result<Image, CommandError> {
        let (place, options) = self.settled(options, server)?;
        match place {
            Self::Export { uri, files } => {
                let storage = storage(uri, *files, server)?;
                if options.access == Access::ReadWrite && !storage.is_writable() {
                    return Err(CommandError::new(format!(
                        "cannot write to {uri}: the server exports this disk read-only"
                    )));
                }
                Image::from_storage(Arc::new(storage), &raw_unless_told(&options))
                    .map_err(|error| explained(error.with_path(uri.to_string())))
            }
            file => Image::open(file.path(), &options)
                .map_err(|error| explained_with(error, raw_option)),
        }
    }

    /// Opens an export as a disk to be overwritten, together with its client.
    ///
    /// # Errors
    ///
    /// If it is a file, or as [`open`](Self::open).
    pub(super) fn open_disk(&self, server: &ServerArgs) -> Result<(Image, Client), CommandError> {
        let Self::Export { uri, files } = self else {
            return Err(CommandError::new(format!("{self} is not a server's disk")));
        };
        let storage = storage(uri, *files, server)?;
        if !storage.is_writable() {
            return Err(CommandError::new(format!(
                "cannot write to {uri}: the server exports this disk read-only"
            )));
        }
        let client = storage.client().clone();
        let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
        let image = Image::from_storage(Arc::new(storage), &options);
        Ok((image.map_err(|error| explained(error.with_path(uri.to_string())))?, client))
    }

    /// Returns the name of the file or the URI.
    pub(super) fn name(&self) -> String {
        match self {
            Self::File(path) => path.to_string_lossy().into_owned(),
            Self::Export { uri, .. } => uri.to_string(),
            Self::Described { place, .. } => place.name(),
        }
    }

    /// Returns the path of the file; empty for an export.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Export { .. } => Path::new(""),
            Self::Described { place, .. } => place.path(),
        }
    }

    /// Resolves a name in the image: relative names start at its directory.
    ///
    /// # Errors
    ///
    /// If it is a malformed name of a server.
    pub(in crate::commands) fn beside(&self, name: &OsStr) -> Result<Self, CommandError> {
        if let Some(name) = name.to_str().filter(|name| has_scheme(name)) {
            let (name, backing) = from_name_in_image(name).map_err(CommandError::new)?;
            let place = Self::of(name, LocalFiles::Refused);
            return Ok(match backing {
                BackingInName::AsNamed => place,
                // The image records the format.
                backing => Self::Described {
                    place: Box::new(place),
                    format: FormatInName::Unsaid,
                    backing,
                },
            });
        }
        Ok(Self::File(match (self.uri(), path_in(name)) {
            (None, path) if path.as_os_str() == name => beside(self.path(), name),
            // As in QEMU, a name with a scheme starts at the working directory.
            (_, path) => path.to_owned(),
        }))
    }

    /// Returns the backing file of the image, in which `name` and `format` are recorded, and its
    /// format.
    ///
    /// # Errors
    ///
    /// As [`beside`](Self::beside).
    pub(super) fn backing(
        &self,
        recorded: Option<(&OsStr, Option<Format>)>,
    ) -> Result<Option<(Self, Option<Format>)>, CommandError> {
        let (name, format) = recorded.unzip();
        let named = || name.map(|name| self.beside(name)).transpose();
        let given = match self {
            Self::Described { backing: BackingInName::Ignored, .. } => return Ok(None),
            Self::Described { backing: BackingInName::Given(given), .. } => given,
            _ => return Ok(named()?.map(|place| (place, format.flatten()))),
        };
        let place = match &given.name {
            Some(name) => Some(Self::of(name.clone(), self.local_files())),
            None => named()?,
        };
        let described = |place| Self::Described {
            place: Box::new(place),
            format: FormatInName::Unsaid,
            backing: given.backing.clone(),
        };
        let format = given.format.known().or(format.flatten());
        Ok(place.map(|place| (described(place), format)))
    }

    /// Returns whether a URI beside this place may name files of this machine: if its own may.
    fn local_files(&self) -> LocalFiles {
        match self {
            Self::File(_) => LocalFiles::Allowed,
            Self::Export { files, .. } => *files,
            Self::Described { place, .. } => place.local_files(),
        }
    }

    /// Returns the file, or the opened export.
    fn target(self, server: &ServerArgs) -> Result<NameTarget, CommandError> {
        match self {
            Self::Export { uri, files } => {
                Ok(NameTarget::Storage(Arc::new(storage(&uri, files, server)?)))
            }
            file => Ok(NameTarget::File(file.path().to_owned())),
        }
    }

    /// Returns the error with the name of this place, if it has none yet.
    pub(super) fn named(&self, error: Error) -> CommandError {
        match self.uri() {
            None => error.into(),
            Some(uri) => error.with_path(uri.to_string()).into(),
        }
    }
}

/// Connects.
pub(super) fn storage(
    uri: &NbdUri,
    files: LocalFiles,
    server: &ServerArgs,
) -> Result<ExportStorage, CommandError> {
    let remotes = server.remotes();
    Ok(match files {
        LocalFiles::Allowed => remotes.open(uri)?,
        LocalFiles::Refused => remotes.open_named_by_image(uri)?,
    })
}

/// The options for an export: its bytes are the disk, regardless of their contents.
fn raw_unless_told(options: &OpenOptions) -> OpenOptions {
    let mut options = options.clone();
    options.format = options.format.or(Some(Format::Raw));
    options
}

impl fmt::Display for ImageLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "'{}'", path.display()),
            Self::Export { uri, .. } => uri.fmt(f),
            Self::Described { place, .. } => place.fmt(f),
        }
    }
}
