//! L2 entries that name metadata, or a place that was nobody's when the image was opened: a guest
//! that writes through them changes nothing else that could be read before.

use std::path::Path;

use imgfmt::{
    Access, BitmapChange, CacheMode, CreateOptions, DirtyExtent, Durability, Format, Image,
    OpenOptions, Recording,
};

use crate::common::{at, range};
use crate::structure::{COPIED, Structure, aim, u64_at};

const CLUSTER: u64 = 512;
/// Three L2 tables' worth.
const CLUSTERS: u64 = 192;
/// The guest cluster whose entry lies.
const ALIASED: u64 = 1;
/// Written before and after it, where nothing was.
const FRESH: [u64; 8] = [100, 101, 102, 103, 104, 160, 161, 162];

fn options(access: Access) -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2).access(access).cache(CacheMode::Unsafe)
}

fn write(disk: &Image, number: u64, fill: u8) -> imgfmt::Result<()> {
    disk.write_at(at(number * CLUSTER), &[fill; CLUSTER as usize], Durability::Cached)
}

/// A disk with data, a snapshot that shares none of the first L2 table, and the disabled bitmap
/// "d".
fn make(path: &Path, has_enabled_bitmap: bool) -> Vec<u8> {
    let mut create = CreateOptions::new(Format::Qcow2, CLUSTERS * CLUSTER);
    create.cluster_size = CLUSTER;
    create.open = options(Access::ReadWrite);
    let mut disk = Image::create(path, &create).unwrap();
    for number in [0, 1, 2, 5, 37, 150] {
        write(&disk, number, 0x51).unwrap();
    }
    disk.create_snapshot("s").unwrap();
    disk.add_bitmap("d", CLUSTER, Recording::Enabled).unwrap();
    if has_enabled_bitmap {
        disk.add_bitmap("b", CLUSTER, Recording::Enabled).unwrap();
    }
    for number in [1, 6, 9, 20] {
        write(&disk, number, 0x54).unwrap();
    }
    disk.bitmap_transaction(&[BitmapChange::Disable { name: "d".into() }]).unwrap();
    disk.close().unwrap();
    std::fs::read(path).unwrap()
}

/// What can be read of the disk, of the snapshot, and of the bitmap.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    disk: Vec<Option<Vec<u8>>>,
    snapshot: Vec<Option<Vec<u8>>>,
    dirty: Option<Vec<DirtyExtent>>,
}

fn look(path: &Path) -> Seen {
    let clusters = |options: &OpenOptions| {
        let Ok(disk) = Image::open(path, options) else { return Vec::new() };
        let read = |number: u64| {
            let mut bytes = vec![0; CLUSTER as usize];
            disk.read_at(at(number * CLUSTER), &mut bytes).ok().map(|()| bytes)
        };
        (0..CLUSTERS).map(read).collect()
    };
    let disk = Image::open(path, &options(Access::ReadOnly)).ok();
    let all = range(0, CLUSTERS * CLUSTER);
    Seen {
        disk: clusters(&options(Access::ReadOnly)),
        snapshot: clusters(&options(Access::ReadOnly).snapshot("s")),
        dirty: disk.and_then(|disk| disk.dirty_extents("d", all, 1000).ok()),
    }
}

/// Writes elsewhere, then through the entry, in place and as a whole; then elsewhere again.
fn attack(path: &Path) {
    let Ok(disk) = Image::open(path, &options(Access::ReadWrite)) else { return };
    FRESH[..4].iter().for_each(|number| drop(write(&disk, *number, 0x61)));
    let aliased = at(ALIASED * CLUSTER + 16);
    let _ = disk.write_at(aliased, &[0xff; 300], Durability::Cached);
    let _ = write(&disk, ALIASED, 0xfe);
    let _ = disk.flush();
    FRESH[4..].iter().for_each(|number| drop(write(&disk, *number, 0x62)));
    let _ = disk.close();
}

fn lost(before: &Seen, after: &Seen) -> Vec<String> {
    let mut lost = Vec::new();
    let differs = |before: &[Option<Vec<u8>>], after: &[Option<Vec<u8>>], number: u64| {
        let number = number as usize;
        before.get(number).is_some_and(Option::is_some) && before[number] != after[number]
    };
    for number in (0..CLUSTERS).filter(|number| *number != ALIASED && !FRESH.contains(number)) {
        if differs(&before.disk, &after.disk, number) {
            lost.push(format!("cluster {number} of the disk"));
        }
    }
    for number in (0..CLUSTERS).filter(|number| differs(&before.snapshot, &after.snapshot, *number))
    {
        lost.push(format!("cluster {number} of the snapshot"));
    }
    // A bitmap may be unusable now, but not another one without a word.
    if after.dirty.is_some() && before.dirty != after.dirty {
        lost.push("the bitmap".into());
    }
    // What was written and acknowledged is not what went through the entry.
    for number in FRESH {
        let is_aliased = |bytes: &Vec<u8>| bytes.iter().any(|byte| [0xff, 0xfe].contains(byte));
        if after.disk[number as usize].as_ref().is_some_and(is_aliased) {
            lost.push(format!("cluster {number}, written a moment before"));
        }
    }
    lost
}

#[test]
fn a_write_through_an_entry_that_names_something_else_costs_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    for has_enabled_bitmap in [true, false] {
        let path = directory.path().join(format!("disk-{has_enabled_bitmap}.qcow2"));
        let sound = make(&path, has_enabled_bitmap);
        let structure = Structure::of(&sound);
        let l1 = u64_at(&sound, 40) as usize;
        let table = u64_at(&sound, l1) & !COPIED;
        let entry = table as usize + ALIASED as usize * 8;
        let pointer = structure.pointers.iter().find(|pointer| pointer.place == entry);
        let pointer = pointer.expect("the entry of the aliased cluster is listed");
        let end = (sound.len() as u64).next_multiple_of(CLUSTER);
        let is_metadata = |(kind, _): &&(String, u64)| !kind.contains("cluster of");
        let targets = structure.clusters.iter().filter(is_metadata).cloned();
        let behind = (0..8).map(|number| ("behind the end".to_owned(), end + number * CLUSTER));
        let mut wrong = Vec::new();
        let mut count = 0;
        for (kind, offset) in targets.chain(behind) {
            std::fs::write(&path, aim(&sound, pointer, offset)).unwrap();
            let before = look(&path);
            attack(&path);
            count += 1;
            for lost in lost(&before, &look(&path)) {
                wrong.push(format!("{kind} ({offset:#x}): {lost}"));
            }
        }
        assert!(count > 20, "only {count} trials");
        assert!(wrong.is_empty(), "{has_enabled_bitmap}: {}", wrong.join("\n"));
    }
}

/// An image with clusters of 64 KiB and one L2 table, which is read in sixteen slices, and data at
/// 0 and at 40 MiB, which two slices map. Returns the offset of the table.
fn make_in_slices(path: &Path) -> usize {
    let disk = Image::create(path, &CreateOptions::new(Format::Qcow2, 512 << 20)).unwrap();
    disk.write_at(at(0), &[0x51; 65536], Durability::Cached).unwrap();
    disk.write_at(at(40 << 20), &[0x52; 65536], Durability::Cached).unwrap();
    disk.close().unwrap();
    let bytes = std::fs::read(path).unwrap();
    (u64_at(&bytes, u64_at(&bytes, 40) as usize) & !COPIED) as usize
}

#[test]
fn an_entry_is_searched_also_after_another_slice_of_its_table_has_changed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let table = make_in_slices(&path);
    let sound = std::fs::read(&path).unwrap();
    let end = (sound.len() as u64).next_multiple_of(65536);
    let mut refused = 0;
    for number in 0..4 {
        let mut bytes = sound.clone();
        let entry = table + (40 << 20 >> 16) * 8;
        bytes[entry..entry + 8].copy_from_slice(&((end + number * 65536) | COPIED).to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let in_slices = options(Access::ReadWrite).metadata_cache_bytes(0);
        let disk = Image::open(&path, &in_slices).unwrap();
        // Takes the next free clusters, one of which the entry names.
        disk.write_at(at(4 << 20), &[0xaa; 4 * 65536], Durability::Cached).unwrap();
        let through = disk.write_at(at(40 << 20), &[0xff; 65536], Durability::Cached);
        refused += u32::from(through.is_err());
        let mut written = vec![0; 4 * 65536];
        disk.read_at(at(4 << 20), &mut written).unwrap();
        assert!(written.iter().all(|byte| *byte == 0xaa), "{number}: {through:?}");
    }
    assert_eq!(refused, 4);
}

#[test]
fn an_entry_that_must_not_be_followed_stays_so_when_its_table_is_cut() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let table = make_in_slices(&path);
    let disk = Image::open(&path, &options(Access::ReadWrite)).unwrap();
    // So that there is an end to cut off.
    disk.write_at(at(200 << 20), &[0x53; 65536], Durability::Cached).unwrap();
    disk.close().unwrap();
    let sound = std::fs::read(&path).unwrap();
    let end = (sound.len() as u64).next_multiple_of(65536);
    let mut refused = 0;
    for number in 0..4 {
        let mut bytes = sound.clone();
        let entry = table + (40 << 20 >> 16) * 8;
        bytes[entry..entry + 8].copy_from_slice(&((end + number * 65536) | COPIED).to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let in_slices = options(Access::ReadWrite).metadata_cache_bytes(0);
        let mut disk = Image::open(&path, &in_slices).unwrap();
        disk.write_at(at(4 << 20), &[0xaa; 4 * 65536], Durability::Cached).unwrap();
        disk.resize(100 << 20, imgfmt::Shrink::Allow).unwrap();
        let through = disk.write_at(at(40 << 20), &[0xff; 65536], Durability::Cached);
        refused += u32::from(through.is_err());
        let mut written = vec![0; 4 * 65536];
        disk.read_at(at(4 << 20), &mut written).unwrap();
        assert!(written.iter().all(|byte| *byte == 0xaa), "{number}: {through:?}");
    }
    assert_eq!(refused, 4);
}

#[test]
fn the_rest_of_a_table_in_which_the_file_ends_is_zero() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let table = make_in_slices(&path);
    let mut bytes = std::fs::read(&path).unwrap();
    let l1 = u64_at(&bytes, 40) as usize;
    bytes.resize(bytes.len().next_multiple_of(65536), 0);
    let end = bytes.len() as u64;
    bytes.extend_from_within(table..table + 512);
    bytes[l1..l1 + 8].copy_from_slice(&(end | COPIED).to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    for cache_bytes in [0, 1 << 20] {
        let in_slices = options(Access::ReadOnly).metadata_cache_bytes(cache_bytes);
        let disk = Image::open(&path, &in_slices).unwrap();
        for (offset, expected) in [(0, 0x51), (40 << 20, 0)] {
            let mut read = vec![9; 65536];
            disk.read_at(at(offset), &mut read).unwrap();
            assert!(read.iter().all(|byte| *byte == expected), "{cache_bytes} {offset}");
        }
    }
}
