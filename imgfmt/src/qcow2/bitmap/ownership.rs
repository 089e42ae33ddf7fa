//! The clusters that belong to bitmaps and to nothing else.
//!
//! In a damaged or hostile image, clusters of a bitmap or of the directory may also be the guest's
//! data or other metadata. Storing such a bitmap again would free what the guest needs, and marking
//! it as in use would write into guest data. A refcount of 1 proves nothing: the counted reference
//! may be the other one. So before the first such change all references of the image are counted,
//! once. Clusters whose ownership cannot be proved are leaked.
//!
//! The count must see every reference. It is made before the first change of the disk that a bitmap
//! records, or when no change is in flight and everything has been flushed.

use std::collections::HashMap;

use super::directory::{DirectoryLocation, Entry};
use super::store::{Bitmaps, ImageServices, Ownership};
use crate::bitmap::Bitmap;
use crate::error::Result;
use crate::qcow2::alloc::allocator::Reserved;
use crate::qcow2::metadata::header_edit::change_autoclear;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::header::autoclear;

/// Why bitmaps are not kept up to date in the image until it is closed.
pub(super) const FOREIGN_DIRECTORY: &str =
    "the list of the bitmaps overlaps with other data of the image";

impl Bitmaps {
    /// Makes sure that the clusters that the bitmaps own are known.
    pub(super) fn find_ownership(
        &self,
        image: &dyn ImageServices,
        bitmaps: &[Bitmap<Entry>],
        directory: Option<DirectoryLocation>,
    ) {
        let mut ownership = self.ownership.lock();
        if !ownership.is_known {
            // Clusters whose references cannot be read are left alone.
            *ownership = self.prove_ownership(image, bitmaps, directory).unwrap_or_default();
            ownership.is_known = true;
        }
    }

    fn prove_ownership(
        &self,
        image: &dyn ImageServices,
        bitmaps: &[Bitmap<Entry>],
        directory: Option<DirectoryLocation>,
    ) -> Result<Ownership> {
        let mut found = Ownership::default();
        let mut uses: HashMap<HostCluster, u64> = HashMap::new();
        let tables = bitmaps.iter().filter(|bitmap| bitmap.stored.damage.is_none());
        let of_bitmaps =
            tables.filter_map(|bitmap| self.table_clusters(bitmap.stored.table).ok()).flatten();
        for cluster in of_bitmaps.chain(self.place_clusters(directory)) {
            *uses.entry(cluster).or_default() += 1;
        }
        if uses.is_empty() {
            return Ok(found);
        }
        let clusters: Vec<HostCluster> = uses.keys().copied().collect();
        let Some(others) = image.references_to(&clusters)? else { return Ok(found) };
        let geometry = self.geometry();
        for (cluster, uses) in uses {
            let references = uses.saturating_add(others.get(&cluster).copied().unwrap_or(0));
            // References to the refcount table and its blocks were not counted.
            if image.is_metadata(geometry.host_offset(cluster))? {
                continue;
            }
            let refcount = self.clusters.allocator()?.refcounts.refcount(cluster)?;
            if refcount >= references {
                found.counted.insert(cluster);
            }
            if refcount > 0 && references == 1 {
                found.alone.insert(cluster);
            }
        }
        Ok(found)
    }

    /// The clusters that a directory takes up.
    pub(super) fn place_clusters(
        &self,
        directory: Option<DirectoryLocation>,
    ) -> impl Iterator<Item = HostCluster> {
        let geometry = self.geometry();
        let clusters =
            move |place: DirectoryLocation| geometry.clusters_touched(place.offset, place.length);
        directory.into_iter().flat_map(clusters)
    }

    /// Durably removes the directory's location from the header if the directory must not be
    /// written in place. The next change of the list creates a new directory; a crash before that
    /// loses the bitmaps.
    pub(super) fn give_up_foreign_directory(
        &self,
        image: &dyn ImageServices,
        directory: &mut Option<DirectoryLocation>,
        bitmaps: &[Bitmap<Entry>],
    ) -> Result<()> {
        if directory.is_none() {
            return Ok(());
        }
        self.find_ownership(image, bitmaps, *directory);
        let is_ours = {
            let ownership = self.ownership.lock();
            self.place_clusters(*directory).all(|cluster| ownership.alone.contains(&cluster))
        };
        if !is_ours {
            self.metadata.edit_header(|file, _| change_autoclear(file, 0, autoclear::BITMAPS))?;
            *directory = None;
        }
        Ok(())
    }

    /// Returns those of `clusters` that may be freed, because all of their references are counted.
    /// They no longer belong to the bitmaps afterwards; the `reserved` ones do.
    pub(super) fn give_away(
        &self,
        clusters: Vec<HostCluster>,
        reserved: &[Reserved],
    ) -> Vec<HostCluster> {
        let geometry = self.geometry();
        let mut ownership = self.ownership.lock();
        let freed: Vec<HostCluster> =
            clusters.into_iter().filter(|cluster| ownership.counted.contains(cluster)).collect();
        for cluster in &freed {
            ownership.counted.remove(cluster);
            ownership.alone.remove(cluster);
        }
        for place in reserved {
            let clusters = geometry.host_cluster(place.offset).run(place.clusters);
            ownership.counted.extend(clusters.clone());
            ownership.alone.extend(clusters);
        }
        freed
    }
}
