//! A disk with damaged tables does not become smaller at the cost of what is alive.

use std::sync::Arc;

use imgfmt::testing::Recorder;
use imgfmt::{Access, Durability, ErrorKind, Format, Image, OpenOptions, Shrink};

use crate::common::at;
use crate::handmade::{COPIED, Handmade, field};

const CLUSTER: usize = 512;
/// What one L2 table covers.
const HALF: u64 = 32 << 10;

/// Two L2 tables, each with a cluster of data; the second one is in cluster 6.
fn two_tables() -> Handmade {
    let mut image = Handmade::new(9, 2 * HALF);
    image.put32(field::L1_SIZE, 2);
    image.add_data(0, 7);
    image.set_refcount(6, 1);
    image.bytes.resize(7 * CLUSTER, 0);
    image.add_data(1, 9);
    // The entry that this made belongs to the second table.
    let entry = (7 * CLUSTER as u64) | COPIED;
    image.set_entry(1, 0);
    image.put64(6 * CLUSTER + 8, entry);
    set_second_table(&mut image, 6);
    image
}

fn set_second_table(image: &mut Handmade, cluster: usize) {
    image.put64(3 * CLUSTER + 8, (cluster * CLUSTER) as u64 | COPIED);
}

fn shrink(image: &Handmade, size: u64) -> (Image, imgfmt::Result<()>) {
    let storage = Recorder::new().storage(&image.bytes);
    let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
    let mut disk = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
    let result = disk.resize(size, Shrink::Allow);
    (disk, result)
}

#[track_caller]
fn check_first_cluster(disk: &Image, what: &str) {
    let mut bytes = [0xee; CLUSTER];
    disk.read_at(at(0), &mut bytes).unwrap();
    assert_eq!(bytes, [7; CLUSTER], "{what}");
}

#[test]
fn a_sound_image_of_two_tables_loses_the_second() {
    let (disk, result) = shrink(&two_tables(), HALF);
    result.unwrap();
    assert_eq!(disk.size(), HALF);
    check_first_cluster(&disk, "sound");
    // What was freed is used again, and nothing else.
    disk.write_at(at(CLUSTER as u64), &[1; 8 * CLUSTER], Durability::Cached).unwrap();
    disk.flush().unwrap();
    check_first_cluster(&disk, "sound, written to");
}

#[test]
fn a_table_that_is_not_its_own_is_not_given_away() {
    for (what, cluster) in [
        ("the refcount table", 1),
        ("a refcount block", 2),
        ("the L1 table", 3),
        ("the first L2 table", 4),
        ("nothing", 20),
    ] {
        let mut image = two_tables();
        set_second_table(&mut image, cluster);
        for size in [HALF, HALF / 2 + 512, HALF + 512] {
            let (disk, result) = shrink(&image, size);
            let kind = result.expect_err(what).kind();
            assert_eq!(kind, ErrorKind::Corrupt, "{what}, to {size}");
            assert_eq!(disk.size(), 2 * HALF, "{what}: nothing has changed");
            check_first_cluster(&disk, what);
        }
    }
}

#[test]
fn an_entry_behind_the_new_end_that_points_to_metadata_is_not_freed() {
    for cluster in [1, 2, 3, 4, 6] {
        let mut image = two_tables();
        image.put64(6 * CLUSTER + 16, (cluster * CLUSTER) as u64 | COPIED);
        for size in [HALF, HALF + 512] {
            let (disk, result) = shrink(&image, size);
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt, "cluster {cluster}");
            assert_eq!(disk.size(), 2 * HALF);
            check_first_cluster(&disk, "an entry");
        }
    }
}
