//! Information that an image holds about itself.

use std::ffi::OsString;

use crate::backup::Backup;
use crate::bitmap::Recording;
use crate::create_options::{CompressionType, L2Entries, Qcow2Version};
use crate::format::Format;
use crate::luks::Encryption;
use crate::qcow2::Snapshot;

/// Facts about an open image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageInfo {
    /// The image's format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub size: u64,
    /// How the content is encrypted, if it is: then it can be described, but neither read nor written.
    pub encryption: Option<Encryption>,
    /// What only qcow2 images have.
    pub qcow2: Option<Qcow2Info>,
}

/// What the image says about a dirty bitmap, without a look at its bits.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapEntry {
    /// Its name.
    pub name: String,
    /// How many bytes of the disk one bit stands for; a power of two.
    pub granularity: u64,
    /// Whether it notes changes.
    pub recording: Recording,
    /// It is being written to, or was not stored when it last was: it is out of date.
    pub is_in_use: bool,
}

/// Facts about a qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Qcow2Info {
    /// Version of the format.
    pub version: Qcow2Version,
    /// Size of a cluster in bytes.
    pub cluster_size: u64,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// Whether there are subclusters.
    pub l2_entries: L2Entries,
    /// The image is marked as damaged.
    pub is_corrupt: bool,
    /// The image was not closed properly, and its refcounts may be wrong.
    pub is_dirty: bool,
    /// Writers may leave refcounts wrong until the image is closed. This crate never does.
    pub lazy_refcounts: bool,
    /// The image holds dirty bitmaps.
    pub has_bitmaps: bool,
    /// Those of its dirty bitmaps that are listed where they should be.
    pub bitmaps: Vec<BitmapEntry>,
    /// Name of the backing file as it stands in the image.
    pub backing_name: Option<OsString>,
    /// Name of the backing file's format as it stands in the image.
    pub backing_format: Option<String>,
    /// Name of the file that holds the data, if it is another one.
    pub data_file_name: Option<OsString>,
    /// That file is a raw image of the disk by itself.
    pub data_file_is_raw: bool,
    /// The internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// The backup that the image is, if it says that it is one.
    pub backup: Option<Backup>,
}
