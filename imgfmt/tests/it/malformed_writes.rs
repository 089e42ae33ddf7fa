//! A guest cannot use damaged tables to change metadata or to blow up the file.

use std::sync::Arc;

use imgfmt::{Access, Durability, ErrorKind, Format, Image, OpenOptions, Speed, Storage, ZeroMode};

use crate::common::{at, range};
use crate::damaged::{CLUSTER, check_others, open, read, sound};
use crate::handmade::COPIED;

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
