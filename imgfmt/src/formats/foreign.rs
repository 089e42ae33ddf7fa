//! What a format has to offer, and what it gets.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;
use crate::foreign_info::FormatDetails;
use crate::format::Format;
use crate::layer::Layer;
use crate::storage::Storage;

/// An open image of a format that is only read.
pub(crate) trait ForeignImage: Layer {
    /// The image that shows where this one has nothing, if there is to be one.
    fn parent(&self) -> Option<&Parent> {
        None
    }

    /// Puts the parent below it. Called once, if [`parent`](Self::parent) names one.
    fn attach_parent(&mut self, _parent: Arc<dyn Layer>) {}

    /// What a child of this image knows it by.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// The unit in which the disk is stored, in bytes.
    fn block_size(&self) -> Option<u64> {
        None
    }

    /// What the image says of itself.
    fn details(&self) -> Option<FormatDetails> {
        None
    }
}

/// What an image says of the one below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parent {
    /// The names under which it may be found, the most likely one first; relative ones start at the
    /// directory of the image.
    pub(crate) names: Vec<OsString>,
    /// Its format, if that is certain.
    pub(crate) format: Option<Format>,
    /// What it must be known by.
    pub(crate) identity: Option<Identity>,
}

impl Parent {
    /// The most likely name, and the name of the format.
    pub(crate) fn recorded(&self) -> (Option<OsString>, Option<String>) {
        (self.names.first().cloned(), self.format.map(|format| format.name().to_owned()))
    }
}

/// A number that an image and its children record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(pub(crate) [u8; 16]);

/// What a format opens an image from.
pub(crate) struct Opening<'o> {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) path: Option<&'o Path>,
    /// Opens another file that the image names, as far as the policy allows; `None` if the image is
    /// only to be described.
    pub(crate) files: Option<&'o mut OpenFile<'o>>,
}

/// Opens a file by a name in an image.
pub(crate) type OpenFile<'o> = dyn FnMut(&OsStr) -> Result<Arc<dyn Storage>> + 'o;

impl fmt::Debug for Opening<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opening").field("storage", &self.storage).finish_non_exhaustive()
    }
}
