//! Where the disks of a command are: files, and exports of NBD servers.

use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use imgfmt::{Access, Error, Format, Image, OpenOptions};
use nbd_proto::NbdUri;

use super::open::explained;
use crate::commands::copy::location::Location;
use crate::connect::TlsArgs;
use crate::error::CommandError;
use crate::remote::ExportStorage;

/// A file, or an export of a server.
#[derive(Clone, Debug)]
pub(super) enum Place {
    File(PathBuf),
    Export(NbdUri),
}

impl Place {
    /// Reads a word of the command line.
    pub(super) fn parse(word: &OsStr) -> Result<Self, CommandError> {
        // Names of files need not be text; URIs are.
        let Some(text) = word.to_str() else { return Ok(Self::File(word.into())) };
        match text.parse().map_err(CommandError::new)? {
            Location::File(path) => Ok(Self::File(path)),
            Location::Nbd(uri) => Ok(Self::Export(uri)),
            Location::Standard | Location::Null => Err(CommandError::new(format!(
                "'{text}' is no image; give a file (./{text} if that is its name) or an NBD URI"
            ))),
        }
    }

    /// Opens the image there. An export is a raw image unless the options say otherwise.
    pub(super) fn open(&self, options: &OpenOptions) -> Result<Image, CommandError> {
        match self {
            Self::File(path) => Image::open(path, options).map_err(explained),
            Self::Export(uri) => {
                let storage = ExportStorage::open(TlsArgs::default().connector(uri))?;
                if options.access == Access::ReadWrite && !storage.is_writable() {
                    return Err(CommandError::new(format!(
                        "cannot write to {uri}: the server exports this disk read-only"
                    )));
                }
                let mut options = options.clone();
                options.format = options.format.or(Some(Format::Raw));
                Image::from_storage(Arc::new(storage), &options)
                    .map_err(|error| explained(error.with_path(uri.to_string())))
            }
        }
    }

    /// The error with the name of this place, if it has none yet.
    pub(super) fn named(&self, error: Error) -> CommandError {
        match self {
            Self::File(_) => error.into(),
            Self::Export(uri) => error.with_path(uri.to_string()).into(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "'{}'", path.display()),
            Self::Export(uri) => uri.fmt(f),
        }
    }
}
