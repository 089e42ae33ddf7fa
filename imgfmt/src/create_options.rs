//! Options for creating and amending images.

use std::ffi::OsString;

use crate::error::{Error, ErrorKind};
use crate::foreign_options::ForeignOptions;
use crate::format::Format;
use crate::open_policy::OpenPolicy;
use crate::options::OpenOptions;
use crate::passphrase::NewKey;

/// The compression of clusters of a new qcow2 image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompressionType {
    /// Supported by every reader.
    #[default]
    Zlib,
    /// Faster; QEMU 5.1 and later.
    Zstd,
}

/// The version of the qcow2 format of a new image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Qcow2Version {
    /// Without zero clusters and feature bits; QEMU before 1.1 needs it.
    V2,
    /// The current version.
    #[default]
    V3,
}

/// Whether clusters of a new qcow2 image have subclusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum L2Entries {
    /// A cluster is allocated as a whole.
    #[default]
    Standard,
    /// Each 32nd part of a cluster is allocated separately; QEMU 5.2 and later.
    Extended,
}

/// The preallocation of clusters of a new qcow2 image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Preallocation {
    /// None: the file grows with the writes.
    #[default]
    Off,
    /// All clusters are allocated, as holes of the file.
    Metadata,
    /// All clusters are allocated, and the file system has reserved their space.
    Falloc,
    /// All clusters are allocated and filled with zeroes.
    Full,
}

/// Whether other programs may leave the refcounts of an image wrong while it is open, and repair
/// them after a crash. This crate never leaves them wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LazyRefcounts {
    /// Other programs may not.
    #[default]
    Off,
    /// Other programs may.
    On,
}

/// The changes of an existing qcow2 image by [`Image::amend`](crate::Image::amend); `None` keeps a
/// property.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Amendment {
    /// Its version. Version 2 is possible without bitmaps, snapshots and features that it does not
    /// support; zero clusters are converted, to data clusters where the backing file has content.
    pub version: Option<Qcow2Version>,
    /// Whether other programs may leave refcounts wrong while the image is open.
    pub lazy_refcounts: Option<LazyRefcounts>,
    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub refcount_bits: Option<u32>,
    /// Size of the disk in bytes; not smaller than the current one.
    pub size: Option<u64>,
}

/// The role of a separate data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataFile {
    /// It is meaningful only together with the image.
    Plain,
    /// It is a raw image of the disk.
    Raw,
}

/// Options of a new image; created with [`CreateOptions::new`], changed field by field.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CreateOptions {
    /// The format of the image.
    pub format: Format,
    /// Size of the disk in bytes; `None` means the size of the backing file.
    pub size: Option<u64>,
    /// Name of the backing file, as stored in the image (a relative one starts at the image's
    /// directory), and its format. That of a VMDK is a VMDK.
    pub backing: Option<(OsString, Format)>,
    /// How the new image and its backing file are opened. The format, the access and the snapshot
    /// are those of the new image; locking and policy also apply to the backing file while it is
    /// examined for its size; it is not examined if it is [ignored](crate::BackingFile::Ignored)
    /// and the size is given. By default any file may be the backing file. A device is always
    /// locked while the image is written to it.
    pub open: OpenOptions,
    /// Version of the qcow2 format.
    pub version: Qcow2Version,
    /// Size of a cluster in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// The compression of clusters.
    pub compression: CompressionType,
    /// Whether the image has subclusters.
    pub l2_entries: L2Entries,
    /// Whether other programs may leave refcounts wrong while the image is open.
    pub lazy_refcounts: LazyRefcounts,
    /// The preallocation of clusters. Not possible with a backing file.
    pub preallocation: Preallocation,
    /// Name of a new data file. A relative one starts at the image's directory; QEMU would look for
    /// it in its own working directory, so an absolute one is better. Not possible with a backing
    /// file.
    pub data_file: Option<(OsString, DataFile)>,
    /// The key of an encrypted image, a LUKS volume or qcow2: LUKS version 1 with AES-256 in XTS
    /// mode, as QEMU makes it. A new LUKS volume reads as noise until it is written, and so do
    /// clusters of an encrypted qcow2 image that are allocated in advance, unless with
    /// [`Full`](Preallocation::Full). It has no data file.
    pub encryption: Option<NewKey>,
    /// What only formats of other programs have.
    pub foreign: ForeignOptions,
    /// Called repeatedly while zeroes are written for [`Preallocation::Full`] and while the tables
    /// of other programs' formats are made, which may take long:
    /// `true` cancels the creation and removes the new files.
    pub give_up: fn() -> bool,
}

impl CreateOptions {
    /// Creates the options of an image of this format with a disk of `size` bytes, and QEMU's
    /// defaults.
    pub fn new(format: Format, size: u64) -> Self {
        Self {
            format,
            size: Some(size),
            backing: None,
            open: OpenOptions::new().policy(OpenPolicy::any_file()),
            version: Qcow2Version::default(),
            cluster_size: 65536,
            refcount_bits: 16,
            compression: CompressionType::default(),
            l2_entries: L2Entries::default(),
            lazy_refcounts: LazyRefcounts::default(),
            preallocation: Preallocation::default(),
            data_file: None,
            encryption: None,
            foreign: ForeignOptions::default(),
            give_up: || false,
        }
    }

    /// Creates the options of a qcow2 image over a backing file, with the same size.
    pub fn overlay(backing: impl Into<OsString>, format: Format) -> Self {
        let backing = Some((backing.into(), format));
        Self { size: None, backing, ..Self::new(Format::Qcow2, 0) }
    }
}

pub(crate) fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, "create", detail)
}
