//! Information stored in an image.

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
    /// Information specific to qcow2.
    pub qcow2: Option<Qcow2Info>,
}
