//! A guest cannot use damaged tables to change metadata or to blow up the file.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A test may fail, and says what it skips.

mod common;
#[path = "../fuzz/src/handmade.rs"]
mod handmade;

use std::sync::Arc;

use common::{at, range};
use handmade::{COPIED, Handmade};
use imgfmt::storage::fault::{Recording, RecordingStorage};
use imgfmt::{Access, Durability, ErrorKind, Format, Image, OpenOptions, Speed, Storage, ZeroMode};

const CLUSTER: u64 = 65536;

/// Guest cluster 0 holds sevens, cluster 2 nines, cluster 1 is the one that is damaged.
fn sound() -> Handmade {
    let mut image = Handmade::new(16, 1 << 20);
    image.add_data(0, 7);
    image.add_data(2, 9);
    image
}

fn open(image: &Handmade, access: Access) -> (Arc<RecordingStorage>, Image) {
    let storage = Recording::new().storage(&image.bytes);
    let options = OpenOptions::new().format(Format::Qcow2).access(access);
    let disk = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
    (storage, disk)
}

fn read(disk: &Image, guest_cluster: u64) -> imgfmt::Result<Vec<u8>> {
    let mut bytes = vec![0xee; CLUSTER as usize];
    disk.read_at(at(guest_cluster * CLUSTER), &mut bytes).map(|()| bytes)
}

/// Clusters 0 and 2 must still be there.
fn check_others(disk: &Image, what: &str) {
    for (cluster, value) in [(0, 7), (2, 9)] {
        let bytes = read(disk, cluster).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(bytes.iter().all(|byte| *byte == value), "{what}: cluster {cluster} is damaged");
    }
}

/// Everything a guest can do to cluster 1.
fn attack(disk: &Image) -> Vec<imgfmt::Result<()>> {
    let cluster = range(CLUSTER, CLUSTER);
    let cached = Durability::Cached;
    vec![
        disk.write_at(at(CLUSTER + 100), &[1; 512], cached),
        disk.write_at(at(CLUSTER), &[2; CLUSTER as usize], cached),
        disk.write_zeroes(range(CLUSTER + 512, 512), ZeroMode::KeepAllocated, Speed::Any, cached),
        disk.write_zeroes(cluster, ZeroMode::KeepAllocated, Speed::Any, cached),
        disk.write_zeroes(cluster, ZeroMode::MayUnmap, Speed::Any, cached),
        disk.discard(cluster, cached),
        disk.write_at(at(CLUSTER), &[3; 512], cached),
        disk.flush(),
    ]
}

#[test]
fn a_guest_cannot_write_to_metadata_through_an_entry_that_points_there() {
    for (what, place) in [
        ("the refcount table", CLUSTER),
        ("a refcount block", 2 * CLUSTER),
        ("the L1 table", 3 * CLUSTER),
        ("its own L2 table", 4 * CLUSTER),
    ] {
        let mut image = sound();
        image.set_entry(1, COPIED | place);
        let (storage, disk) = open(&image, Access::ReadWrite);
        let error = disk.write_at(at(CLUSTER + 100), &[1; 512], Durability::Cached);
        assert_eq!(error.expect_err(what).kind(), ErrorKind::Corrupt, "{what}");
        attack(&disk);
        check_others(&disk, what);
        drop(disk);
        let options = OpenOptions::new().format(Format::Qcow2);
        let disk = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
        check_others(&disk, &format!("{what}, reopened"));
    }
}

#[test]
fn an_entry_far_behind_the_end_does_not_blow_up_the_file() {
    for place in [1 << 40, 0x007f_ffff_ffff_0000, 0x00ff_ffff_ffff_0000] {
        let mut image = sound();
        image.set_entry(1, COPIED | place);
        let (storage, disk) = open(&image, Access::ReadWrite);
        let _ = read(&disk, 1);
        attack(&disk);
        check_others(&disk, &format!("{place:#x}"));
        drop(disk);
        let length = storage.len().unwrap();
        assert!(length < 1 << 24, "{place:#x}: the file has become {length} bytes long");
    }
}
