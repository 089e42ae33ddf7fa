//! What new images of a format are made from.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::sync::Arc;

use super::foreign::Identity;
use crate::create_options::invalid;
use crate::error::{Error, ErrorKind, Result};
use crate::foreign_options::{ForeignOptions, Subformat};
use crate::layer::{Backing, Layer, WritableLayer};
use crate::storage::Storage;

/// What a new image is to be.
#[derive(Debug)]
pub(crate) struct NewForeign<'o> {
    /// The size of the disk in bytes, as requested.
    pub(crate) size: u64,
    /// The name of the file, without its directory.
    pub(crate) name: OsString,
    pub(crate) options: &'o ForeignOptions,
    /// The image that shows where it has nothing.
    pub(crate) parent: Option<NewParent>,
}

/// The image below a new one.
#[derive(Debug)]
pub(crate) struct NewParent {
    /// The name that the new image records.
    pub(crate) name: OsString,
    pub(crate) layer: Arc<dyn Layer>,
    pub(crate) identity: Option<Identity>,
}

/// A new image that was found possible.
pub(crate) struct Planned {
    /// The size of the disk in bytes, which may have been rounded up.
    pub(crate) size: u64,
    /// The size of a block in bytes, for what is known of the data in advance.
    pub(crate) block_size: u64,
    /// The length of the file in bytes, by the number of blocks that are stored.
    pub(crate) length: Box<dyn Fn(u64) -> u64>,
    /// Whether it can be written from the start to the end.
    pub(crate) in_order: InOrder,
    /// The files with its data, if they are several, under their final names.
    pub(crate) extents: Vec<(OsString, Self)>,
    /// Makes it in an empty storage with these extents, unless the function, which is asked
    /// repeatedly, gives it up.
    pub(crate) begin: Box<Begin>,
}

/// What to do about a format that is not written from the start to the end.
pub(crate) const OTHER_FORMATS: &str = "make a raw image, a fixed VHD or a compressed VMDK";

/// How an image is written from the start to the end.
pub(crate) enum InOrder {
    /// Not at all; this has to be chosen instead.
    No(&'static str),
    /// It always is.
    Always,
    /// As the bytes of the disk, with these behind them.
    Disk(Vec<u8>),
}

pub(crate) type Begin =
    dyn FnOnce(Arc<dyn Storage>, Extents, fn() -> bool) -> Result<Box<dyn WritableLayer>>;

/// The parts of a disk, in order.
pub(crate) type Extents = Vec<Box<dyn WritableLayer>>;

impl fmt::Debug for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Planned").field("size", &self.size).finish_non_exhaustive()
    }
}

impl NewForeign<'_> {
    /// The size of the disk in whole units of this many bytes.
    pub(super) fn size_in(&self, unit: u64) -> Result<u64> {
        let size = self.size.checked_next_multiple_of(unit).filter(|size| *size <= i64::MAX as u64);
        size.ok_or_else(|| invalid("a disk of 2^63 bytes or more is not possible"))
    }

    /// Whether every block has its place from the start; formats that call this are not compressed.
    pub(super) fn is_fixed(&self, format: &str) -> Result<bool> {
        match self.options.subformat {
            Subformat::Dynamic => Ok(false),
            Subformat::Fixed => Ok(true),
            Subformat::StreamOptimized => Err(missing(format, "compressed form")),
        }
    }

    /// What is below it.
    pub(super) fn backing(&self) -> Option<Backing> {
        self.parent.as_ref().map(|parent| Backing::new(Arc::clone(&parent.layer)))
    }

    /// The name as text for other programs.
    pub(super) fn name(&self) -> &OsStr {
        self.options.final_name.as_deref().unwrap_or(&self.name)
    }
}

/// That a disk is larger than its format allows.
pub(super) fn too_large(size: u64, format: &str, most: &str) -> Error {
    invalid(format!("a disk of {size} bytes is too large for {format}, whose limit is {most}"))
}

/// That a format lacks an option.
pub(super) fn missing(format: &str, option: &str) -> Error {
    let detail = format!("{format} images have no {option}");
    Error::new(ErrorKind::InvalidInput, "create", detail)
}

/// Sixteen random bytes, as identifiers of images consist of them.
pub(super) fn random() -> Result<[u8; 16]> {
    let random = crate::backup::Uuid::random();
    Ok(random.map_err(|error| Error::from_io("create", error))?.bytes())
}
