//! Refcounts that lie, in an image that is opened for writing and written to: no ordinary write
//! puts refcounts, or new clusters, over what could be read before.

use std::path::Path;

use imgfmt::{
    Access, CreateOptions, Durability, ErrorKind, Format, Image, OpenOptions, Recording, Repair,
};

use crate::common::{Random, at};
use crate::structure::{Structure, aim, u64_at};

const CLUSTER: u64 = 512;
const SIZE: u64 = 1 << 20;
/// The first part of the disk holds data, the rest nothing.
const USED: u64 = 600 << 10;

fn options(access: Access) -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2).access(access)
}

/// An image with several refcount blocks and L2 tables, and a snapshot.
fn make(path: &Path, refcount_bits: u32) -> Vec<u8> {
    let mut create = CreateOptions::new(Format::Qcow2, SIZE);
    create.cluster_size = CLUSTER;
    create.refcount_bits = refcount_bits;
    let mut disk = Image::create(path, &create).unwrap();
    for offset in (0..USED).step_by(CLUSTER as usize) {
        let data = [(offset / CLUSTER % 250 + 1) as u8; CLUSTER as usize];
        disk.write_at(at(offset), &data, Durability::Cached).unwrap();
    }
    disk.create_snapshot("s").unwrap();
    disk.write_at(at(0), &[0xaa; 2048], Durability::Cached).unwrap();
    disk.close().unwrap();
    std::fs::read(path).unwrap()
}

fn content(path: &Path, snapshot: Option<&str>) -> Option<Vec<u8>> {
    let mut options = options(Access::ReadOnly);
    if let Some(name) = snapshot {
        options = options.snapshot(name);
    }
    let disk = Image::open(path, &options).ok()?;
    let mut bytes = vec![0; USED as usize];
    disk.read_at(at(0), &mut bytes).ok().map(|()| bytes)
}

/// Writes where nothing was, and on top of what a snapshot shares. Whether everything succeeded.
fn write(path: &Path) -> imgfmt::Result<()> {
    let disk = Image::open(path, &options(Access::ReadWrite))?;
    for offset in (USED..USED + (64 << 10)).step_by(CLUSTER as usize) {
        disk.write_at(at(offset), &[0x77; CLUSTER as usize], Durability::Cached)?;
    }
    disk.close()
}

#[test]
fn a_write_never_puts_refcounts_or_data_over_what_is_there() {
    for refcount_bits in [16, 8] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let sound = make(&path, refcount_bits);
        let structure = Structure::of(&sound);
        let is_refcount = |name: &str| name.contains("refcount");
        let pointers = structure.pointers.iter().filter(|pointer| is_refcount(&pointer.name));
        let (mut count, mut refused) = (0, 0);
        for pointer in pointers {
            for (target, offset) in &structure.clusters {
                let damaged = aim(&sound, pointer, *offset);
                if damaged == sound {
                    continue;
                }
                std::fs::write(&path, &damaged).unwrap();
                let before = (content(&path, None), content(&path, Some("s")));
                if let Err(error) = write(&path) {
                    refused += 1;
                    let kinds = [ErrorKind::Corrupt, ErrorKind::InvalidFormat];
                    assert!(kinds.contains(&error.kind()), "{error}");
                }
                let what = format!("{} -> {target} ({offset:#x})", pointer.name);
                let after = (content(&path, None), content(&path, Some("s")));
                // A header that leads nowhere cannot be opened, before and after.
                assert!(before == after, "{refcount_bits} bits: {what}: data was overwritten");
                count += 1;
            }
        }
        assert!(count > 50 && refused > 20, "{refused} of {count} refused");
    }
}

/// A repair puts blocks where other blocks count them.
#[test]
fn blocks_that_a_repair_has_moved_are_written_unless_they_are_something_else_as_well() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let sound = make(&path, 16);
    let structure = Structure::of(&sound);
    let entry = structure.pointers.iter().find(|pointer| pointer.name == "refcount table entry");
    let data = structure.clusters.iter().find(|(what, _)| what == "a data cluster of L1");
    std::fs::write(&path, aim(&sound, entry.unwrap(), data.unwrap().1)).unwrap();
    Image::check_file(&path, &options(Access::ReadOnly), Repair::All).unwrap();
    let rebuilt = std::fs::read(&path).unwrap();
    write(&path).unwrap();
    let report = Image::check_file(&path, &options(Access::ReadOnly), Repair::None).unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.messages);

    let structure = Structure::of(&rebuilt);
    let blocks = structure.clusters.iter().filter(|(what, _)| what == "a refcount block");
    let is_data = |name: &str| name.ends_with("L2 entry of a data cluster");
    let mut refused = 0;
    for (_, block) in blocks {
        for pointer in structure.pointers.iter().filter(|pointer| is_data(&pointer.name)) {
            std::fs::write(&path, aim(&rebuilt, pointer, *block)).unwrap();
            let before = (content(&path, None), content(&path, Some("s")));
            refused += u32::from(write(&path).is_err());
            let after = (content(&path, None), content(&path, Some("s")));
            assert!(before == after, "{} -> {block:#x}: data was overwritten", pointer.name);
        }
    }
    assert!(refused > 0, "the last block is always written");
}

#[test]
fn a_missing_refcount_block_hides_no_data_from_the_allocator() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut bytes = make(&path, 16);
    let before = content(&path, None).unwrap();
    let table = u64_at(&bytes, 48) as usize;
    assert!(u64_at(&bytes, table + 16) != 0, "there are several blocks");
    bytes[table + 8..table + 16].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    // The clusters that the missing block counts look free; the blocks before are full.
    let written = write(&path);
    assert_eq!(content(&path, None).unwrap(), before);
    assert_eq!(written.unwrap_err().kind(), ErrorKind::Corrupt);
    let report = Image::check_file(&path, &options(Access::ReadOnly), Repair::All).unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.messages);
    assert_eq!(content(&path, None).unwrap(), before);
    write(&path).unwrap();
}

#[test]
fn a_missing_refcount_block_of_clusters_that_nothing_uses_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let bytes = make(&path, 16);
    // As on a device: there is room behind the image for which there is no block yet.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(bytes.len() as u64 + (1 << 20)).unwrap();
    write(&path).unwrap();
    let report = Image::check_file(&path, &options(Access::ReadOnly), Repair::None).unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.messages);
}

/// An L2 table may name clusters of several refcount blocks.
#[test]
fn a_refcount_block_that_cannot_be_read_keeps_nobody_from_writing_to_the_clusters_of_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut create = CreateOptions::new(Format::Qcow2, SIZE);
    create.cluster_size = CLUSTER;
    let disk = Image::create(&path, &create).unwrap();
    disk.write_at(at(0), &[7; USED as usize], Durability::Cached).unwrap();
    disk.close().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let (l1, refcounts) = (u64_at(&bytes, 40) as usize, u64_at(&bytes, 48) as usize);
    let mask = 0x00ff_ffff_ffff_fe00;
    let host_of = |guest: u64| {
        let l2 = u64_at(&bytes, l1 + (guest / (64 * CLUSTER) * 8) as usize) & mask;
        u64_at(&bytes, (l2 + guest / CLUSTER % 64 * 8) as usize) & mask
    };
    // A block of 512 bytes counts 256 clusters; the third lies beyond the end of the file now.
    let is_sound = |guest: &u64| host_of(*guest) / (256 * CLUSTER) != 2;
    let guests = (0..USED).step_by(CLUSTER as usize);
    let (sound, others): (Vec<u64>, Vec<u64>) = guests.partition(is_sound);
    assert!(sound.len() > 500 && others.len() > 200);
    bytes[refcounts + 16..refcounts + 24].copy_from_slice(&(1u64 << 40).to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let disk = Image::open(&path, &options(Access::ReadWrite)).unwrap();
    for guest in sound {
        disk.write_at(at(guest), &[8; CLUSTER as usize], Durability::Cached).unwrap();
    }
    for guest in others {
        disk.write_at(at(guest), &[8; CLUSTER as usize], Durability::Cached).unwrap_err();
    }
}

/// Runs something that must end. A deadlock fails the test instead of stopping all of them.
fn within_a_minute<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(std::time::Duration::from_secs(60)).expect("it ends")
}

/// What a crash can leave: a file that is longer than its refcount blocks reach.
#[test]
fn bitmaps_are_stored_and_recorded_where_refcount_blocks_are_missing() {
    for used_clusters in 200..260 {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let mut create = CreateOptions::new(Format::Qcow2, SIZE);
        create.cluster_size = CLUSTER;
        let disk = Image::create(&path, &create).unwrap();
        let data = vec![0x5a; (used_clusters * CLUSTER) as usize];
        disk.write_at(at(0), &data, Durability::Cached).unwrap();
        disk.add_bitmap("first", 512, Recording::Enabled).unwrap();
        disk.close().unwrap();
        let length = std::fs::metadata(&path).unwrap().len();
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(length + (300 << 10))
            .unwrap();
        let image = path.clone();
        within_a_minute(move || {
            let disk = Image::open(&image, &options(Access::ReadWrite)).unwrap();
            disk.add_bitmap("second", 512, Recording::Enabled).unwrap();
            let others = std::thread::scope(|scope| {
                let adding = scope.spawn(|| disk.add_bitmap("third", 512, Recording::Enabled));
                for offset in (USED..SIZE).step_by(8192) {
                    disk.write_at(at(offset), &[0x77; 4096], Durability::Cached).unwrap();
                }
                adding.join().unwrap()
            });
            others.unwrap();
            disk.close().unwrap();
        });
        let disk = Image::open(&path, &options(Access::ReadOnly)).unwrap();
        assert_eq!(disk.bitmaps().len(), 3, "{used_clusters}");
        let mut bytes = vec![0; data.len()];
        disk.read_at(at(0), &mut bytes).unwrap();
        assert!(bytes == data, "{used_clusters}");
        let report = Image::check_file(&path, &options(Access::ReadOnly), Repair::None).unwrap();
        assert_eq!(report.corruptions, 0, "{used_clusters}: {report:?}");
    }
}

#[test]
fn a_refcount_block_that_the_end_of_the_file_cuts_off_is_rebuilt() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut bytes = make(&path, 16);
    let before = [content(&path, None), content(&path, Some("s"))];
    let end = (bytes.len() as u64).next_multiple_of(CLUSTER);
    bytes.resize(end as usize + 100, 0);
    let table = u64_at(&bytes, 48) as usize;
    let unused = (table..table + CLUSTER as usize).step_by(8).find(|at| u64_at(&bytes, *at) == 0);
    let unused = unused.unwrap();
    bytes[unused..unused + 8].copy_from_slice(&end.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let found = Image::check_file(&path, &options(Access::ReadOnly), Repair::None).unwrap();
    assert!(found.corruptions > 0, "{found:?}");
    Image::check_file(&path, &options(Access::ReadOnly), Repair::Leaks).unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes, "-r leaks has written");
    let left = Image::check_file(&path, &options(Access::ReadOnly), Repair::All).unwrap();
    assert_eq!((left.corruptions, left.leaks), (0, 0), "{left:?}");
    assert!([content(&path, None), content(&path, Some("s"))] == before);
}

#[test]
fn compressed_data_is_written_where_a_refcount_block_of_unused_clusters_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let bytes = make(&path, 16);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(bytes.len() as u64 + (1 << 20)).unwrap();
    let disk = Image::open(&path, &options(Access::ReadWrite)).unwrap();
    let mut random = Random::new("half compressible");
    // In the L2 table that no snapshot shares: nothing else needs a place. Nothing is free before a
    // flush.
    for offset in (0..8).flat_map(|_| (0..64 * CLUSTER).step_by(CLUSTER as usize)) {
        let mut data = [0; CLUSTER as usize];
        data[..400].fill_with(|| random.below(256) as u8);
        disk.write_compressed(at(offset), &data).unwrap();
    }
    disk.close().unwrap();
    let report = Image::check_file(&path, &options(Access::ReadOnly), Repair::None).unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.messages);
}
