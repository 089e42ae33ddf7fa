//! Damaged tables: what they concern cannot be read, everything else can, and a guest cannot use
//! them to change metadata or to blow up the file.

use std::sync::Arc;

use imgfmt::testing::Recorder;
use imgfmt::{Access, Durability, ErrorKind, Format, Image, OpenOptions, Storage};

use crate::common::{at, range};
use crate::damaged::{CLUSTER, check_others, open, read, sound};
use crate::handmade::{COMPRESSED, COPIED, Handmade, field};

#[test]
fn a_damaged_entry_makes_its_cluster_unreadable_and_no_other() {
    let cases: [(&str, u64); 5] = [
        ("the middle of a cluster", COPIED | 0x50200),
        ("compressed at 0", COMPRESSED),
        ("compressed behind the end", COMPRESSED | 1 << 40),
        ("compressed garbage", COMPRESSED | 0x50000),
        ("compressed, in the header", COMPRESSED | 512),
    ];
    for (what, entry) in cases {
        let mut image = sound();
        image.set_entry(1, entry);
        let (storage, disk) = open(&image, Access::ReadOnly);
        let error = read(&disk, 1).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        assert!(!error.to_string().contains('\n'));
        check_others(&disk, what);
        let _ = disk.extents(range(0, 1 << 20)).count();
        let _ = disk.map_read(range(0, 1 << 20));
        assert!(storage.content() == image.bytes, "{what}");
    }
}

#[test]
fn an_l1_entry_that_leads_nowhere_makes_reads_fail() {
    for entry in [COPIED | 0x40200, COPIED | 1 << 40, COPIED | 0x00ff_ffff_ffff_0000] {
        let mut image = sound();
        image.put64(3 * image.cluster(), entry);
        let (_, disk) = open(&image, Access::ReadOnly);
        assert_eq!(read(&disk, 0).unwrap_err().kind(), ErrorKind::Corrupt, "{entry:#x}");
        let (storage, disk) = open(&image, Access::ReadWrite);
        let write = disk.write_at(at(0), &[1; 512], Durability::Cached);
        assert_eq!(write.unwrap_err().kind(), ErrorKind::Corrupt, "{entry:#x}");
        drop(disk);
        assert!(storage.content() == image.bytes, "{entry:#x}");
    }
}

#[test]
fn contradictions_of_subclusters_are_found() {
    for (what, entry, bitmap) in
        [("data and zero", COPIED | 0x50000, 1 << 32 | 1), ("data and no cluster", 0, 1)]
    {
        let mut image = Handmade::new(16, 1 << 20).extended();
        image.add_data(0, 7);
        image.add_data(2, 9);
        image.set_entry(1, entry);
        image.set_bitmap(1, bitmap);
        let (_, disk) = open(&image, Access::ReadOnly);
        assert_eq!(read(&disk, 1).expect_err(what).kind(), ErrorKind::Corrupt, "{what}");
        check_others(&disk, what);
    }
}

#[test]
fn the_zero_flag_does_not_exist_in_version_2() {
    let mut image = sound();
    image.put32(field::VERSION, 2);
    image.bytes[72..112].fill(0);
    image.set_entry(1, 1);
    let (_, disk) = open(&image, Access::ReadOnly);
    assert_eq!(read(&disk, 1).unwrap_err().kind(), ErrorKind::Corrupt);
    check_others(&disk, "version 2");
}

#[test]
fn a_compressed_bomb_yields_one_cluster_and_no_more() {
    // 16 MiB of zeroes in one stream, of which the format allows one cluster.
    let mut deflater = flate2::Compress::new(flate2::Compression::fast(), false);
    let mut stream = vec![0; 2 << 20];
    let chunk = vec![0; 1 << 20];
    for _ in 0..16 {
        let out = deflater.total_out() as usize;
        deflater.compress(&chunk, &mut stream[out..], flate2::FlushCompress::None).unwrap();
    }
    stream.truncate(deflater.total_out() as usize);
    let mut image = sound();
    image.add_compressed(1, &stream);
    let (_, disk) = open(&image, Access::ReadOnly);
    assert!(read(&disk, 1).unwrap().iter().all(|byte| *byte == 0));
    check_others(&disk, "bomb");
}

#[test]
fn tables_that_are_counted_as_free_are_not_given_away() {
    for free in 0..5 {
        let mut image = sound();
        image.set_refcount(free, 0);
        let (storage, disk) = open(&image, Access::ReadWrite);
        for cluster in 3..16 {
            let _ =
                disk.write_at(at(cluster * CLUSTER), &[5; CLUSTER as usize], Durability::Cached);
        }
        let _ = disk.flush();
        check_others(&disk, &format!("cluster {free} counted as free"));
        drop(disk);
        let options = OpenOptions::new().format(Format::Qcow2);
        let disk = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
        check_others(&disk, &format!("cluster {free} counted as free, reopened"));
    }
}

#[test]
fn damaged_refcounts_stop_allocations_and_nothing_else() {
    for (what, block) in [
        ("no block", 0),
        ("not aligned", 0x20200),
        ("behind the end", 1 << 40),
        ("at the end of the world", 0x00ff_ffff_ffff_0000),
    ] {
        let mut image = sound();
        image.put64(image.cluster(), block);
        let storage = Recorder::new().storage(&image.bytes);
        let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
        let Ok(disk) = Image::from_storage(Arc::clone(&storage) as _, &options) else {
            assert!(storage.content() == image.bytes, "{what}");
            continue;
        };
        let error = disk.write_at(at(5 * CLUSTER), &[1; 512], Durability::Cached);
        error.expect_err(what);
        // A cluster of which nothing is known may be written in place or not.
        if let Err(error) = disk.write_at(at(0), &[7; 512], Durability::Cached) {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        }
        check_others(&disk, what);
        drop(disk);
        assert!(storage.len().unwrap() < 1 << 24, "{what}");
    }
}

#[test]
fn a_table_that_two_l1_entries_share_is_not_written_through_one_of_them() {
    // 64 KiB clusters map 512 MiB per table: the second half of this disk shows the first.
    let mut image = sound();
    image.put64(field::SIZE, 1 << 30);
    image.put32(field::L1_SIZE, 2);
    image.put64(3 * image.cluster() + 8, (4 * CLUSTER) | COPIED);
    let (storage, disk) = open(&image, Access::ReadWrite);
    for cluster in 3..40 {
        let _ = disk.write_at(at((512 << 20) + cluster * CLUSTER), &[5; 700], Durability::Cached);
        let _ = disk.discard(range((512 << 20) + cluster * CLUSTER, CLUSTER), Durability::Cached);
    }
    let _ = disk.flush();
    drop(disk);
    // What becomes of such an image is open, but it must neither hang nor grow without bound.
    assert!(storage.len().unwrap() < 1 << 26);
}
