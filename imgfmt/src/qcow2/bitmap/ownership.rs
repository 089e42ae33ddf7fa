//! Which clusters belong to bitmaps and to nothing else.
//!
//! A damaged or hostile image may have a bitmap whose table or bits, or a directory that, lie in the
//! guest's data or in other metadata. Storing such a bitmap again would free what the guest needs, and
//! marking it as in use would write into it. That each cluster has the refcount 1 proves nothing: the
//! one reference that was counted may be the other one. So before the first such change all
//! references of the image are counted, once. What cannot be proved leaks.
//!
//! The count must see every reference. It is made before the first change of the disk that a bitmap
//! notes, or where there is none on its way and everything has been flushed.

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
    "the list of the bitmaps lies where the image has something else";

impl Bitmaps {
    /// Makes sure that it is known what the bitmaps own.
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
            // Refcounts and their table are not among those that were counted.
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

    /// Makes the image, durably, name no directory if the one that it names must not be written in
    /// place. The next change of the list makes a new one; after a crash before that there are no bitmaps.
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

    /// Those of `clusters` that may be freed, because for each of their references there is a refcount. After
    /// that they are not the bitmaps' any more, and what was `reserved` is.
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
