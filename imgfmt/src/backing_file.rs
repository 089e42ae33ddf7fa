//! Backing files given by the caller, in place of the one that an image names.

use std::path::PathBuf;
use std::sync::Arc;

use crate::access::{ExpectedEncryption, Locking};
use crate::cache_mode::CacheMode;
use crate::format::Format;
use crate::storage::{Part, Storage};

/// The treatment of the backing file that an image names.
#[derive(Clone, Debug, Default)]
pub enum BackingFile {
    /// It is opened, and supplies the content where the image itself has none.
    #[default]
    AsNamed,
    /// It is not opened: ranges without content in the image itself read as zero. The image
    /// continues to name it, so zeroes written now hide the backing file's content later.
    Ignored,
    /// These options override what the image says. The image itself is not changed: opened without
    /// them, it can show other content.
    Given(Box<BackingOptions>),
}

/// Options for one backing file; created with [`BackingOptions::default`] and changed field by
/// field. `None` leaves a field to the image above.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct BackingOptions {
    /// The file in place of the one that the image names. It is the caller's choice, so no policy
    /// applies to it.
    pub target: Option<NameTarget>,
    /// The format in place of the one that the image records.
    pub format: Option<Format>,
    /// The locking in place of the image's.
    pub locking: Option<Locking>,
    /// The cache mode in place of the image's.
    pub cache: Option<CacheMode>,
    /// The memory for metadata tables, in bytes, in place of the image's.
    pub metadata_cache_bytes: Option<u64>,
    /// Whether it must be encrypted.
    pub encryption: ExpectedEncryption,
    /// The backing file below this one.
    pub backing: BackingFile,
}

/// The result of resolving a name with a scheme.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum NameTarget {
    /// A file, which is opened if the policy allows it. A relative path starts at the working
    /// directory.
    File(PathBuf),
    /// A storage that is already open.
    Storage(Arc<dyn Storage>),
    /// A part of a file or storage.
    Part(Box<Self>, Part),
    /// An image that is to be opened with this treatment of its own backing file. The policy
    /// applies to the files in it.
    WithBacking(Box<Self>, BackingFile),
    /// A name that the caller does not allow.
    Denied,
}
