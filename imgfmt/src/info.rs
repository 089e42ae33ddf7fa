//! Information stored in an image.

use std::ffi::OsString;

use crate::foreign_info::FormatDetails;
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
    /// Length of the file or storage, in bytes; of an image below another one that is in a part of
    /// it, that of the part. `None` of an open image.
    pub file_length: Option<u64>,
    /// The encryption of the content, if there is any: the image can then be described, but neither
    /// read nor written.
    pub encryption: Option<Encryption>,
    /// The name of the image below this one, as recorded in it. Of several recorded names: the one
    /// by which `inspect_chain` has found that image, otherwise the most likely one.
    pub backing_name: Option<OsString>,
    /// The recorded format of that image.
    pub backing_format: Option<String>,
    /// The unit in which an image of a format that is only read stores its disk, in bytes, if it
    /// has one.
    pub block_size: Option<u64>,
    /// Information specific to the format, for VDI, VHD, VHDX and VMDK.
    pub details: Option<FormatDetails>,
    /// Information specific to qcow2.
    pub qcow2: Option<Qcow2Info>,
}

impl ImageInfo {
    /// Information about an image that names no other.
    pub(crate) const fn new(format: Format, size: u64) -> Self {
        Self {
            format,
            size,
            file_length: None,
            encryption: None,
            backing_name: None,
            backing_format: None,
            block_size: None,
            details: None,
            qcow2: None,
        }
    }
}
