//! Snapshots of images with damaged tables are not made, applied or deleted at the cost of what is
//! alive.

use std::sync::Arc;

use imgfmt::testing::Recorder;
use imgfmt::{Access, ErrorKind, Format, Image, OpenOptions};

use crate::common;
use crate::damaged::{CLUSTER, check_others, open, sound};
use crate::handmade::{COPIED, Handmade};

const PLACES: [(&str, u64); 5] = [
    ("the refcount table", 1),
    ("a refcount block", 2),
    ("the L1 table", 3),
    ("its own L2 table", 4),
    ("nothing", 20),
];

#[track_caller]
fn is_refused(result: imgfmt::Result<()>, what: &str) {
    assert_eq!(result.expect_err(what).kind(), ErrorKind::Corrupt, "{what}");
}

#[test]
fn a_snapshot_is_not_made_of_entries_that_point_to_metadata() {
    for (what, place) in PLACES {
        let mut image = sound();
        image.set_entry(1, COPIED | (place * CLUSTER));
        let (_, mut disk) = open(&image, Access::ReadWrite);
        is_refused(disk.create_snapshot("one"), what);
        check_others(&disk, what);
        let (_, mut disk) = open(&image, Access::ReadWrite);
        is_refused(disk.clear(), what);
        check_others(&disk, what);
    }
}

/// The bytes of a sound image with a snapshot, after which cluster 1 was written: the snapshot has
/// the old L2 table, the disk one of its own.
fn with_snapshot() -> Handmade {
    let mut image = sound();
    let (storage, mut disk) = open(&image, Access::ReadWrite);
    disk.create_snapshot("one").unwrap();
    let cached = imgfmt::Durability::Cached;
    disk.write_at(common::at(CLUSTER), &[5; CLUSTER as usize], cached).unwrap();
    disk.close().unwrap();
    image.bytes = storage.content();
    image
}

#[test]
fn a_snapshot_with_entries_that_point_to_metadata_is_neither_applied_nor_deleted() {
    for (what, place) in PLACES.into_iter().filter(|(_, place)| *place != 4) {
        let mut image = with_snapshot();
        image.set_entry(1, place * CLUSTER);
        let changes: [fn(&mut Image) -> imgfmt::Result<()>; 2] =
            [|disk| disk.apply_snapshot("one"), |disk| disk.delete_snapshot("one")];
        for change in changes {
            let storage = Recorder::new().storage(&image.bytes);
            let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
            let mut disk = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
            is_refused(change(&mut disk), what);
            check_others(&disk, what);
            drop(disk);
            let options = OpenOptions::new().format(Format::Qcow2);
            let disk = Image::from_storage(storage as _, &options).unwrap();
            check_others(&disk, &format!("{what}, reopened"));
            assert_eq!(disk.info().unwrap().qcow2.unwrap().snapshots.len(), 1, "{what}");
        }
    }
}
