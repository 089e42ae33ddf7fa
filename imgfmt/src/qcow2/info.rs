//! Information stored in a qcow2 image.

use std::ffi::OsString;

use crate::backup::Backup;
use crate::bitmap::Recording;
use crate::create_options::{CompressionType, L2Entries, Qcow2Version};
use crate::qcow2::on_disk::snapshot::Snapshot;

/// The properties of a dirty bitmap, without its bits.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapEntry {
    /// Its name.
    pub name: String,
    /// Bytes of the disk per bit; a power of two.
    pub granularity: u64,
    /// Whether it records changes.
    pub recording: Recording,
    /// Whether it is marked as in use: its stored bits are out of date.
    pub is_in_use: bool,
    /// The bitmap to which a checkpoint has moved bits of this one, which is incomplete without
    /// them ([`BitmapState::Incomplete`](crate::BitmapState::Incomplete)).
    pub frozen: Option<String>,
}

/// Information about a qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Qcow2Info {
    /// Version of the format.
    pub version: Qcow2Version,
    /// Size of a cluster in bytes.
    pub cluster_size: u64,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// The compression of compressed clusters.
    pub compression: CompressionType,
    /// Whether the image has subclusters.
    pub l2_entries: L2Entries,
    /// Whether the image is marked as damaged.
    pub is_corrupt: bool,
    /// Whether the image was not closed properly, so that its refcounts may be wrong.
    pub is_dirty: bool,
    /// Whether writers may leave refcounts wrong until the image is closed. This crate never leaves
    /// them wrong.
    pub lazy_refcounts: bool,
    /// Whether the image contains dirty bitmaps.
    pub has_bitmaps: bool,
    /// The dirty bitmaps in its directory.
    pub bitmaps: Vec<BitmapEntry>,
    /// Name of the backing file, as stored in the image.
    pub backing_name: Option<OsString>,
    /// Name of the backing file's format, as stored in the image.
    pub backing_format: Option<String>,
    /// Name of the data file, if the data is in a separate file.
    pub data_file_name: Option<OsString>,
    /// Whether the data file is a raw image of the disk.
    pub data_file_is_raw: bool,
    /// The internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// The backup identity of the image, if it has one.
    pub backup: Option<Backup>,
}
