//! Information stored in an image.

use std::ffi::OsString;

use crate::format::Format;
use crate::luks::Encryption;
use crate::qcow2::Qcow2Info;

/// Information about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageInfo {
    /// The format of the image.
    pub format: Format,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The encryption of the content, if there is any: the image can then be described, but neither
    /// read nor written.
    pub encryption: Option<Encryption>,
    /// The name of the image below this one, as recorded in it. Of several recorded names: the one
    /// by which `inspect_chain` has found that image, otherwise the most likely one.
    pub backing_name: Option<OsString>,
    /// The recorded format of that image.
    pub backing_format: Option<String>,
    /// Information specific to qcow2.
    pub qcow2: Option<Qcow2Info>,
}

impl ImageInfo {
    /// Information about an image that names no other.
    pub(crate) const fn new(format: Format, size: u64) -> Self {
        let (backing_name, backing_format) = (None, None);
        Self { format, size, encryption: None, backing_name, backing_format, qcow2: None }
    }
}
