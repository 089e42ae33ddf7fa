//! What a new image is to be like, and what is to change in one that exists.

use std::ffi::OsString;

use crate::error::{Error, ErrorKind};
use crate::format::Format;
use crate::open_policy::OpenPolicy;
use crate::options::Locking;

/// How the clusters of a new qcow2 image are compressed, if any ever are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompressionType {
    /// Understood by every reader.
    #[default]
    Zlib,
    /// Faster; QEMU 5.1 and later.
    Zstd,
}

/// Which version of the qcow2 format a new image has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Qcow2Version {
    /// Without zero clusters and feature bits; QEMU before 1.1 needs it.
    V2,
    /// The present one.
    #[default]
    V3,
}

/// Whether clusters of a new qcow2 image have subclusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum L2Entries {
    /// A cluster is allocated as a whole.
    #[default]
    Standard,
    /// Each 32nd part of a cluster is allocated by itself; QEMU 5.2 and later.
    Extended,
}

/// Which clusters of a new qcow2 image have a place in the file from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Preallocation {
    /// None: the file grows with what is written.
    #[default]
    Off,
    /// All have one, and it is a hole of the file.
    Metadata,
    /// All have one, and the file system has set the space aside.
    Falloc,
    /// All have one, and zeroes are written there.
    Full,
}

/// Whether other programs may leave the refcounts of an image wrong while they have it open, and
/// repair them after a crash. This crate never does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LazyRefcounts {
    /// They may not.
    #[default]
    Off,
    /// They may.
    On,
}

/// What is to change in a qcow2 image that exists, see [`Image::amend`](crate::Image::amend); `None` leaves it
/// as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Amendment {
    /// Its version. Version 2 is possible without bitmaps, snapshots and features that it does not have;
    /// clusters that are noted as zero get other forms then, zeroes as data where a backing file would show.
    pub version: Option<Qcow2Version>,
    /// Whether other programs may be late with refcounts.
    pub lazy_refcounts: Option<LazyRefcounts>,
    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub refcount_bits: Option<u32>,
    /// Size of the disk in bytes; not smaller than it is.
    pub size: Option<u64>,
}

/// How data is kept in a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataFile {
    /// Only together with the image does it mean anything.
    Plain,
    /// By itself it is a raw image of the disk.
    Raw,
}

/// What a new image is to be like; made with [`CreateOptions::new`], changed field by field.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CreateOptions {
    /// The image's format.
    pub format: Format,
    /// Size of the disk in bytes; `None` takes the backing file's.
    pub size: Option<u64>,
    /// Name of the backing file as it is to stand in the image (a relative one starts at the
    /// image's folder), and its format.
    pub backing: Option<(OsString, Format)>,
    /// What the backing file may be: it is looked at, and its size is taken. By default any file.
    pub backing_policy: OpenPolicy,
    /// How the backing file, and a new file that is filled, are locked meanwhile. Devices always are.
    pub locking: Locking,
    /// Version of the qcow2 format.
    pub version: Qcow2Version,
    /// Size of a cluster in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// How clusters are compressed.
    pub compression: CompressionType,
    /// Whether there are subclusters.
    pub l2_entries: L2Entries,
    /// Whether other programs may be late with refcounts.
    pub lazy_refcounts: LazyRefcounts,
    /// Which clusters have a place from the start. Not with a backing file.
    pub preallocation: Preallocation,
    /// Name of a new file that is to hold the data. A relative one starts at the image's folder;
    /// QEMU would look for it in its own working folder, so better give an absolute one. Not with
    /// a backing file.
    pub data_file: Option<(OsString, DataFile)>,
    /// Asked again and again while zeroes are written for [`Preallocation::Full`], which may take long: `true`
    /// gives the creation up, and nothing of it stays.
    pub give_up: fn() -> bool,
}

impl CreateOptions {
    /// An image of this format with a disk of `size` bytes, and otherwise what QEMU makes.
    pub fn new(format: Format, size: u64) -> Self {
        Self {
            format,
            size: Some(size),
            backing: None,
            backing_policy: OpenPolicy::any_file(),
            locking: Locking::default(),
            version: Qcow2Version::default(),
            cluster_size: 65536,
            refcount_bits: 16,
            compression: CompressionType::default(),
            l2_entries: L2Entries::default(),
            lazy_refcounts: LazyRefcounts::default(),
            preallocation: Preallocation::default(),
            data_file: None,
            give_up: || false,
        }
    }

    /// A qcow2 image over a backing file, of the same size.
    pub fn overlay(backing: impl Into<OsString>, format: Format) -> Self {
        let backing = Some((backing.into(), format));
        Self { size: None, backing, ..Self::new(Format::Qcow2, 0) }
    }
}

pub(crate) fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, "create", detail)
}
