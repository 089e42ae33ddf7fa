//! Whether clusters were allocated before they were written.

use std::sync::{Arc, OnceLock};

use crate::error::Result;
use crate::mapping::Lookup;
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::refcount::Refcounts;
use crate::qcow2::on_disk::words::read_words;
use crate::units::GuestOffset;

/// Whether an image has clusters that were allocated but never written, once that is known.
#[derive(Debug)]
pub(in crate::qcow2) struct Preallocated {
    metadata: Arc<MetadataFile>,
    answer: OnceLock<bool>,
}

impl Preallocated {
    pub(in crate::qcow2) fn new(metadata: Arc<MetadataFile>) -> Self {
        Self { metadata, answer: OnceLock::new() }
    }

    /// Whether the file may have holes where clusters are allocated, as far as `lookup` allows to
    /// find out.
    pub(in crate::qcow2) fn may_be(&self, lookup: Lookup) -> bool {
        match lookup {
            Lookup::CachedOnly => self.answer.get() != Some(&false),
            Lookup::MayRead => self.is(),
        }
    }

    /// Whether the image has clusters that were allocated but never written: then, and only then,
    /// it is worth asking the file system about them. Found out once, as QEMU does, by comparing
    /// the clusters in use with the space that the file takes up.
    fn is(&self) -> bool {
        if let Some(known) = self.answer.get() {
            return *known;
        }
        // The map is returned even if refcounts cannot be read.
        let answer = self.look().unwrap_or(false);
        *self.answer.get_or_init(|| answer)
    }

    fn look(&self) -> Result<bool> {
        let io = |error| self.metadata.io("find the size of", error, GuestOffset::new(0));
        let Some(allocated) = self.metadata.file.allocated_len().map_err(io)? else {
            return Ok(false);
        };
        let geometry = self.metadata.header().geometry;
        let real = allocated >> geometry.cluster_bits;
        let threshold = (real.saturating_mul(10) / 9).max(real.saturating_add(2));
        let file_clusters = geometry.clusters_of(self.metadata.file.len().map_err(io)?);
        if file_clusters < threshold {
            return Ok(false);
        }
        let words = u64::from(self.metadata.header().refcount_table_clusters)
            << (geometry.cluster_bits - 3);
        let table = read_words(
            &*self.metadata.file,
            self.metadata.header().refcount_table_offset,
            words as usize,
        )?;
        let mut refcounts = Refcounts::new(Arc::clone(&self.metadata.file), geometry, table);
        let (mut used, mut cluster) = (0, HostCluster::new(0));
        let file_end = HostCluster::new(file_clusters);
        // Every block takes up space: an image with more of them than space is damaged.
        for _ in 0..=real {
            let block_end = (cluster + geometry.block_entries()).min(file_end);
            while cluster < block_end {
                used += u64::from(refcounts.refcount(cluster)? > 0);
                cluster += 1;
            }
            if used >= threshold || cluster == file_end {
                return Ok(used >= threshold);
            }
        }
        Ok(false)
    }
}
