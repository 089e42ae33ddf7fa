//! qcow2 images, versions 2 and 3.
//!
//! A guest offset is looked up in two steps: the L1 table, always in memory, names L2 tables, which
//! are cached; an L2 entry says where a cluster's data is. [`map`] does that and nothing else; [`io`]
//! then moves the bytes with no lock held. Changes of metadata are made in memory and reach the disk
//! in the order that [`metadata`] keeps.

mod alloc;
mod bitmap;
mod check;
mod driver;
mod flush;
mod io;
mod map;
mod metadata;
mod on_disk;
mod open;
mod purpose;
mod structure;

use std::sync::{Arc, OnceLock};

use crate::backup::Backup;
use crate::create::{CompressionType, L2Entries, Qcow2Version};
use crate::driver::Driver;
use crate::error::Result;
use crate::info::Qcow2Info;
use crate::luks::{self, Encryption};
use crate::storage::Storage;

use alloc::clusters::Clusters;
use bitmap::Bitmaps;
use map::mapping_tables::MappingTables;
use metadata::commits::Commits;
use metadata::metadata_file::MetadataFile;
use on_disk::geometry::Geometry;
use on_disk::header::{Compression, ENCRYPTION_AES, autoclear, compatible, incompatible};
use on_disk::words::read_error;

pub use bitmap::frozen_bitmap_name;
pub(crate) use bitmap::no_bitmap;
pub use check::{CheckReport, Repair};
pub(crate) use metadata::backing_change::change_backing;
pub(crate) use metadata::seal::seal;
pub(crate) use on_disk::incomplete::incomplete_header;
pub use on_disk::snapshot::Snapshot;
pub(crate) use purpose::Purpose;
pub(crate) use structure::amend::{amend, refuse_amendment};
pub(crate) use structure::create::layout;

/// An open qcow2 image.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    metadata: Arc<MetadataFile>,
    /// Holds the data.
    data: Arc<dyn Storage>,
    /// Size of the disk that is shown: the image's or that of a snapshot.
    size: u64,
    /// Whether clusters were allocated before they were written; found out when it matters.
    preallocated: OnceLock<bool>,
    backing: Option<Backing>,
    clusters: Arc<Clusters>,
    mapping: MappingTables,
    commits: Arc<Commits>,
    bitmaps: Bitmaps,
}

/// The image below, which has what this one has not.
#[derive(Debug)]
struct Backing {
    driver: Box<dyn Driver>,
    size: u64,
}

impl Qcow2 {
    /// What the header says.
    pub(crate) fn info(&self) -> Result<Qcow2Info> {
        let header = self.metadata.header();
        Ok(Qcow2Info {
            version: if header.version < 3 { Qcow2Version::V2 } else { Qcow2Version::V3 },
            cluster_size: header.geometry.cluster_size(),
            refcount_bits: header.geometry.refcount_bits(),
            compression: match header.compression {
                Compression::Zlib => CompressionType::Zlib,
                Compression::Zstd => CompressionType::Zstd,
            },
            l2_entries: match header.geometry.extended_l2 {
                true => L2Entries::Extended,
                false => L2Entries::Standard,
            },
            is_corrupt: header.incompatible & incompatible::CORRUPT != 0,
            is_dirty: header.incompatible & incompatible::DIRTY != 0,
            lazy_refcounts: header.compatible & compatible::LAZY_REFCOUNTS != 0,
            has_bitmaps: !self.has_no_bitmaps(),
            bitmaps: self.bitmap_entries(),
            backing_name: header.backing_name.clone(),
            backing_format: header.extensions.backing_format.clone(),
            data_file_name: header.extensions.data_file_name.clone(),
            data_file_is_raw: header.autoclear & autoclear::RAW_DATA_FILE != 0,
            snapshots: self.snapshots()?,
            backup: self.metadata.backup(),
        })
    }

    /// How the image is encrypted; an open one is not, unless it was opened to be described.
    pub(crate) fn encryption(&self) -> Result<Option<Encryption>> {
        let header = self.metadata.header();
        match header.encryption_method {
            0 => Ok(None),
            ENCRYPTION_AES => Ok(Some(Encryption::Aes)),
            _ => {
                let place = header.extensions.encryption_header;
                let luks = place.map(|offset| luks::read(&*self.metadata.file, offset)).transpose();
                Ok(Some(Encryption::Luks(luks.map_err(read_error)?.flatten())))
            }
        }
    }

    /// The image below, if there is one and it is a qcow2 image.
    pub(crate) fn backing_image(&self) -> Option<&Self> {
        self.backing.as_ref()?.driver.as_qcow2()
    }

    pub(crate) fn has_backing(&self) -> bool {
        self.backing.is_some()
    }

    /// What the file says about the backup that it is.
    pub(crate) fn backup(&self) -> Option<Backup> {
        self.metadata.backup()
    }

    /// Has the header say no longer that the file is as the backup left it.
    pub(crate) fn break_seal(&self) -> Result<()> {
        self.metadata.break_seal()
    }

    pub(crate) fn path(&self) -> Option<&std::path::Path> {
        self.metadata.path()
    }

    fn geometry(&self) -> Geometry {
        self.mapping.geometry()
    }
}
