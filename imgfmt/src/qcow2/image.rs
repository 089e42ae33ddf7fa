//! An open image: its parts, and information about it.

use crate::backing_slot::BackingSlot;
use crate::backup::{Backup, ContentMask, Uuid};
use crate::bitmap::BitmapChange;
use crate::create_options::{CompressionType, L2Entries, Qcow2Version};
use crate::error::Result;
use crate::luks::{self, Encryption};
use crate::qcow2::alloc::clusters::Clusters;
use crate::qcow2::alloc::preallocated::Preallocated;
use crate::qcow2::bitmap::{Bitmaps, ImageServices};
use crate::qcow2::data_file::DataFile;
use crate::qcow2::flush::Flusher;
use crate::qcow2::info::Qcow2Info;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::metadata::commits::Commits;
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::header::{
    Compression, ENCRYPTION_AES, autoclear, compatible, incompatible,
};
use crate::qcow2::on_disk::words::read_error;
use crate::units::HostOffset;
use std::collections::HashMap;
use std::sync::Arc;

/// An open qcow2 image.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    pub(in crate::qcow2) metadata: Arc<MetadataFile>,
    pub(in crate::qcow2) data: DataFile,
    /// Size of the visible disk: the image's or that of a snapshot, in bytes.
    pub(in crate::qcow2) size: u64,
    pub(in crate::qcow2) preallocated: Preallocated,
    pub(in crate::qcow2) backing: BackingSlot,
    pub(in crate::qcow2) clusters: Arc<Clusters>,
    pub(in crate::qcow2) mapping: MappingTables,
    pub(in crate::qcow2) commits: Arc<Commits>,
    pub(in crate::qcow2) bitmaps: Bitmaps,
}

impl Qcow2 {
    /// Information from the header.
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
            has_bitmaps: !self.bitmaps.are_none(),
            bitmaps: self.bitmaps.entries(),
            backing_name: header.backing_name.clone(),
            backing_format: header.extensions.backing_format.clone(),
            data_file_name: header.extensions.data_file_name.clone(),
            data_file_is_raw: header.autoclear & autoclear::RAW_DATA_FILE != 0,
            snapshots: self.metadata.snapshots()?,
            backup: self.metadata.backup(),
        })
    }

    /// The encryption of the image, as its header describes it without the key.
    pub(crate) fn encryption(&self) -> Result<Option<Encryption>> {
        let header = self.metadata.header();
        match header.encryption_method {
            0 => Ok(None),
            ENCRYPTION_AES => Ok(Some(Encryption::Aes)),
            _ => {
                let place = header.extensions.encryption_header;
                let luks =
                    place.map(|(offset, _)| luks::read(&*self.metadata.file, offset)).transpose();
                Ok(Some(Encryption::Luks(luks.map_err(read_error)?.flatten())))
            }
        }
    }

    /// The persistent dirty bitmaps.
    pub(crate) fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    /// Makes all changes of bitmaps at one instant, at which no write is in flight, or none of
    /// them.
    pub(crate) fn change_bitmaps(&self, changes: &[BitmapChange]) -> Result<()> {
        self.bitmaps.transaction(self, changes)
    }

    /// Merges the frozen bits of all bitmaps back; see [`Bitmaps::thaw`].
    pub(crate) fn thaw_bitmaps(&self) -> Result<Vec<String>> {
        self.bitmaps.thaw(self)
    }

    /// The record of the backup in the file, with the sum that it hides; without the key of
    /// encrypted data there is none.
    pub(crate) fn backup(&self) -> Option<Backup> {
        let mut backup = self.metadata.backup()?;
        let identity = &mut backup.identity;
        identity.content = identity
            .content
            .and_then(|hidden| Some(self.data.sum_mask(identity.id).ok()?.apply(hidden)));
        Some(backup)
    }

    /// What hides the sum of a backup in the header.
    pub(crate) fn sum_mask(&self, backup: Uuid) -> Result<ContentMask> {
        self.data.sum_mask(backup)
    }

    /// Whether data is encrypted in the file.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.data.is_encrypted()
    }

    /// Whether the file has a record of a backup that cannot be read.
    pub(crate) fn is_unreadable_backup(&self) -> bool {
        self.metadata.is_unreadable_backup()
    }

    /// Clears the mark that the file is as the backup left it.
    pub(crate) fn break_seal(&self) -> Result<()> {
        self.metadata.break_seal()
    }

    pub(crate) fn path(&self) -> Option<&std::path::Path> {
        self.metadata.path()
    }

    /// Writes all changes to disk.
    pub(in crate::qcow2) fn flusher(&self) -> Flusher<'_> {
        Flusher {
            metadata: &self.metadata,
            data: &self.data,
            clusters: &self.clusters,
            mapping: &self.mapping,
            commits: &self.commits,
            is_alone: false,
        }
    }

    /// The size of a subcluster in bytes.
    pub(crate) fn subcluster_size(&self) -> u64 {
        self.geometry().subcluster_size()
    }

    pub(in crate::qcow2) fn geometry(&self) -> Geometry {
        self.mapping.geometry()
    }
}

impl ImageServices for Qcow2 {
    fn flush(&self) -> Result<()> {
        self.flusher().flush()
    }

    fn references_to(&self, clusters: &[HostCluster]) -> Result<Option<HashMap<HostCluster, u64>>> {
        self.count_references_to(clusters)
    }

    fn is_metadata(&self, offset: HostOffset) -> Result<bool> {
        self.mapping.is_metadata(offset)
    }
}
