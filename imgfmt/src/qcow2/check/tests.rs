use std::sync::Arc;

use super::Checker;
use crate::access::Access;
use crate::layer::WritableLayer;
use crate::options::OpenOptions;
use crate::qcow2::image::Qcow2;
use crate::qcow2::on_disk::header::Header;
use crate::qcow2::purpose::Purpose;
use crate::storage::{Durability, MemoryStorage, Storage};
use crate::units::GuestOffset;

/// What has refcounts of its own, with clusters of 512 bytes: header, refcount table, block, L1.
fn small_image(clusters: u64) -> Vec<u8> {
    let l1_entries = clusters.div_ceil(64);
    let l1_clusters = (l1_entries * 8).div_ceil(512);
    let mut bytes = vec![0; (3 + l1_clusters as usize) * 512];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    let words = [(4, 3), (20, 9), (36, l1_entries as u32), (56, 1), (96, 4), (100, 104)];
    for (at, value) in words {
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    for (at, value) in [(24, clusters * 512), (40, 3 * 512), (48, 512), (512, 2 * 512)] {
        bytes[at..at + 8].copy_from_slice(&u64::to_be_bytes(value));
    }
    for cluster in 0..3 + l1_clusters as usize {
        bytes[1024 + cluster * 2 + 1] = 1;
    }
    bytes
}

#[test]
fn references_are_counted_in_an_open_image_whose_refcount_table_has_moved() {
    // A table of one cluster names 64 blocks, each of 256 clusters.
    let clusters = 64 * 256 + 1000;
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(&small_image(clusters)));
    let options = OpenOptions::new().access(Access::ReadWrite);
    let image = Qcow2::open(Arc::clone(&storage), None, &options, Purpose::Use).unwrap();
    for number in 0..clusters {
        let offset = GuestOffset::new(number * 512);
        image.write_at(offset, &[0xff; 512], Durability::Cached).unwrap();
    }
    image.flusher().flush().unwrap();
    let on_disk = Header::read(&*storage, Purpose::Use).unwrap();
    assert_ne!(on_disk.refcount_table_offset.bytes(), 512, "the table has not moved");
    image.flusher().flush().unwrap();
    image.clusters.release_all_freed();
    // The old place is free, and is given to the guest.
    image.write_at(GuestOffset::new(0), &[0xee; 512], Durability::Cached).unwrap();
    image.flusher().flush().unwrap();
    let report = Checker::run(&image).unwrap().report;
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.messages);
}
