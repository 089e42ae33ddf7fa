use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use super::store::{Bitmaps, ImageServices};
use crate::bitmap::{BitmapChange, BitmapState, Recording};
use crate::error::{ErrorKind, Result};
use crate::options::OpenOptions;
use crate::qcow2::alloc::allocator::make_allocator;
use crate::qcow2::alloc::clusters::{Clusters, CountReferences};
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::metadata::metadata_file::tests::opened;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::header::Header;
use crate::qcow2::purpose::Purpose;
use crate::storage::{Storage, Tracked};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// An image whose disk refers to no clusters but these.
#[derive(Default)]
struct Image {
    flushes: AtomicUsize,
    guest: HashSet<HostCluster>,
}

impl CountReferences for Image {
    fn used_refcount_blocks(&self) -> Result<HashSet<u64>> {
        Ok(HashSet::new())
    }
}

impl ImageServices for Image {
    fn flush(&self) -> Result<()> {
        self.flushes.fetch_add(1, Relaxed);
        Ok(())
    }

    fn references_to(&self, clusters: &[HostCluster]) -> Result<Option<HashMap<HostCluster, u64>>> {
        let count = |cluster: &HostCluster| (*cluster, u64::from(self.guest.contains(cluster)));
        Ok(Some(clusters.iter().map(count).collect()))
    }

    fn is_metadata(&self, _: HostOffset) -> Result<bool> {
        Ok(false)
    }
}

/// The bitmaps of an image without any; of 1 MiB.
fn no_bitmaps() -> (Arc<dyn Storage>, Bitmaps) {
    let (storage, metadata) = opened(true);
    let metadata = Arc::new(metadata);
    let allocator = make_allocator(&metadata.file, &metadata.header()).unwrap();
    let clusters = Clusters::new(Arc::clone(&metadata), Arc::default(), Some(allocator));
    let bitmaps = Bitmaps::open((metadata, Arc::new(clusters)), &OpenOptions::new());
    (storage, bitmaps)
}

/// The bitmaps that the file says it has. Nobody flushes the refcounts here: they are the same.
fn reopened(storage: &Arc<dyn Storage>, former: &Bitmaps) -> Bitmaps {
    let header = Header::read(&**storage, Purpose::Use).unwrap();
    let metadata =
        MetadataFile::new(Arc::new(Tracked::new(Arc::clone(storage), false)), None, header, true);
    Bitmaps::open((Arc::new(metadata), Arc::clone(&former.clusters)), &OpenOptions::new())
}

fn add(name: &str) -> BitmapChange {
    let (name, recording) = (name.to_owned(), Recording::Enabled);
    BitmapChange::Add { name, granularity: 65536, recording }
}

fn range(offset: u64, length: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(offset), length).unwrap()
}

fn dirty_bytes(bitmaps: &Bitmaps, name: &str) -> Option<u64> {
    let found = bitmaps.list().into_iter().find(|bitmap| bitmap.name == name)?;
    match found.state {
        BitmapState::Consistent { dirty_bytes } => Some(dirty_bytes),
        _ => None,
    }
}

#[test]
fn a_bitmap_notes_changes_from_the_instant_on_at_which_it_was_added() {
    let (storage, bitmaps) = no_bitmaps();
    let image = Image::default();
    assert!(bitmaps.are_none() && reopened(&storage, &bitmaps).are_none());
    drop(bitmaps.before_change(&image, range(0, 65536)).unwrap());
    bitmaps.transaction(&image, &[add("daily")]).unwrap();
    assert!(image.flushes.load(Relaxed) > 0, "nothing was flushed before the switch");
    assert_eq!(dirty_bytes(&bitmaps, "daily"), Some(0));
    drop(bitmaps.before_change(&image, range(65536, 1)).unwrap());
    assert_eq!(dirty_bytes(&bitmaps, "daily"), Some(65536));
    // What is stored is out of date until it is stored again.
    assert_eq!(dirty_bytes(&reopened(&storage, &bitmaps), "daily"), None);
    bitmaps.store(&image).unwrap();
    assert_eq!(dirty_bytes(&reopened(&storage, &bitmaps), "daily"), Some(65536));
}

#[test]
fn of_several_changes_all_or_none_are_made() {
    let (storage, bitmaps) = no_bitmaps();
    let image = Image::default();
    let refused = bitmaps.transaction(&image, &[add("daily"), add("daily")]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
    assert!(bitmaps.are_none() && reopened(&storage, &bitmaps).are_none());
    bitmaps.transaction(&image, &[add("daily"), add("weekly")]).unwrap();
    assert_eq!(reopened(&storage, &bitmaps).entries().len(), 2);
}

#[test]
fn a_list_of_bitmaps_in_a_cluster_of_the_guest_is_not_written_to_and_not_freed() {
    let (storage, bitmaps) = no_bitmaps();
    bitmaps.transaction(&Image::default(), &[add("daily")]).unwrap();
    // The guest's disk refers to whatever the bitmaps have.
    let image = Image { guest: HostCluster::new(4).run(12).collect(), ..Image::default() };
    let bitmaps = reopened(&storage, &bitmaps);
    bitmaps.begin_recording();
    let places = bitmaps.places().0;
    let content = |(offset, length)| {
        let mut bytes = vec![0; length as usize];
        storage.read_exact_at(offset, &mut bytes).unwrap();
        bytes
    };
    let before: Vec<Vec<u8>> = places.iter().copied().map(content).collect();
    assert!(!before.is_empty());
    drop(bitmaps.before_change(&image, range(0, 1)).unwrap());
    assert!(reopened(&storage, &bitmaps).are_none(), "the image still names the foreign list");
    bitmaps.store(&image).unwrap();
    let after: Vec<Vec<u8>> = places.into_iter().map(content).collect();
    assert!(before == after);
    assert_eq!(dirty_bytes(&reopened(&storage, &bitmaps), "daily"), Some(65536));
}

#[test]
fn what_a_larger_disk_gains_is_clean_unless_it_had_been_cut_off() {
    let (_, mut bitmaps) = no_bitmaps();
    let image = Image::default();
    bitmaps.transaction(&image, &[add("daily")]).unwrap();
    bitmaps.resize(2 << 20);
    assert_eq!(dirty_bytes(&bitmaps, "daily"), Some(0));
    bitmaps.resize(1 << 20);
    bitmaps.resize(2 << 20);
    assert_eq!(dirty_bytes(&bitmaps, "daily"), Some(1 << 20));
}

#[test]
fn a_disabled_bitmap_in_a_cluster_of_the_guest_is_marked_before_that_can_change() {
    let (storage, bitmaps) = no_bitmaps();
    bitmaps.transaction(&Image::default(), &[add("daily")]).unwrap();
    drop(bitmaps.before_change(&Image::default(), range(0, 1)).unwrap());
    let disable = BitmapChange::Disable { name: "daily".into() };
    bitmaps.transaction(&Image::default(), &[disable]).unwrap();
    let directory = bitmaps.places().0[0].0;
    let clusters = bitmaps.places().0.into_iter().map(|(offset, _)| offset);
    let geometry = bitmaps.geometry();
    let guest = clusters.filter(|offset| *offset != directory);
    let guest = guest.map(|offset| geometry.host_cluster(offset)).collect();
    let image = Image { guest, ..Image::default() };
    let opened = reopened(&storage, &bitmaps);
    opened.begin_recording();
    drop(opened.before_change(&image, range(0, 1)).unwrap());
    assert_eq!(dirty_bytes(&reopened(&storage, &bitmaps), "daily"), None);
    opened.store(&image).unwrap();
    assert_eq!(dirty_bytes(&reopened(&storage, &bitmaps), "daily"), Some(65536));
    // One that lies where nothing else is needs no mark.
    let opened = reopened(&storage, &bitmaps);
    opened.begin_recording();
    drop(opened.before_change(&Image::default(), range(0, 1)).unwrap());
    assert_eq!(dirty_bytes(&reopened(&storage, &bitmaps), "daily"), Some(65536));
}
