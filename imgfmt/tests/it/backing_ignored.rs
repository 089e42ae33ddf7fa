//! An image opened without its backing file, as a tool that copies one layer alone wants it.

use std::path::{Path, PathBuf};

use imgfmt::{
    Access, BackingFile, CreateOptions, Durability, Format, Image, OpenOptions, Qcow2Version,
    Speed, ZeroMode,
};

use crate::common::{all_extents, at, range};

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 16 * CLUSTER;

fn fill(image: &Image, offset: u64, length: u64, byte: u8) {
    image.write_at(at(offset), &vec![byte; length as usize], Durability::Cached).unwrap();
}

fn read(image: &Image, offset: u64, length: u64) -> Vec<u8> {
    let mut data = vec![0xee; length as usize];
    image.read_at(at(offset), &mut data).unwrap();
    data
}

/// A base full of sevens and, over it, an image whose first cluster is full of ones.
fn overlay(directory: &Path, version: Qcow2Version) -> PathBuf {
    let (base, top) = (directory.join("base.qcow2"), directory.join("top.qcow2"));
    Image::create(&base, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    let writable = OpenOptions::new().access(Access::ReadWrite);
    let image = Image::open(&base, &writable).unwrap();
    fill(&image, 0, SIZE, 7);
    image.close().unwrap();
    let mut options = CreateOptions::new(Format::Qcow2, SIZE);
    options.version = version;
    options.backing = Some(("base.qcow2".into(), Format::Qcow2));
    Image::create(&top, &options).unwrap();
    let image = Image::open(&top, &writable).unwrap();
    fill(&image, 0, CLUSTER, 1);
    image.close().unwrap();
    top
}

#[test]
fn what_the_image_does_not_hold_reads_as_zero_and_the_base_need_not_exist() {
    let directory = tempfile::tempdir().unwrap();
    let top = overlay(directory.path(), Qcow2Version::V3);
    std::fs::remove_file(directory.path().join("base.qcow2")).unwrap();
    assert!(Image::open(&top, &OpenOptions::new()).is_err());
    let alone = Image::open(&top, &OpenOptions::new().backing(BackingFile::Ignored)).unwrap();
    assert_eq!(alone.size(), SIZE);
    assert!(read(&alone, 0, CLUSTER) == vec![1; CLUSTER as usize]);
    assert!(read(&alone, CLUSTER, SIZE - CLUSTER) == vec![0; (SIZE - CLUSTER) as usize]);
    let extents = all_extents(&alone, range(0, SIZE));
    let depths: Vec<_> = extents.iter().map(|extent| extent.depth).collect();
    assert_eq!(depths, [1, 0]);
}

#[test]
fn zeroes_written_meanwhile_hide_the_base_when_it_is_back() {
    for version in [Qcow2Version::V2, Qcow2Version::V3] {
        let directory = tempfile::tempdir().unwrap();
        let top = overlay(directory.path(), version);
        let writable = OpenOptions::new().access(Access::ReadWrite);
        let alone = Image::open(&top, &writable.clone().backing(BackingFile::Ignored)).unwrap();
        let zero = |offset, length| {
            let range = range(offset, length);
            alone.write_zeroes(range, ZeroMode::MayUnmap, Speed::Any, Durability::Cached).unwrap();
        };
        zero(0, CLUSTER);
        zero(CLUSTER, CLUSTER);
        zero(5 * CLUSTER + 1000, 2000);
        fill(&alone, 2 * CLUSTER + 100, 300, 2);
        fill(&alone, 3 * CLUSTER, CLUSTER, 3);
        alone.discard(range(3 * CLUSTER, CLUSTER), Durability::Cached).unwrap();
        alone.close().unwrap();

        let whole = Image::open(&top, &OpenOptions::new()).unwrap();
        let mut third = vec![0; CLUSTER as usize];
        third[100..400].fill(2);
        assert!(read(&whole, 0, 2 * CLUSTER) == vec![0; 2 * CLUSTER as usize], "{version:?}");
        assert!(read(&whole, 2 * CLUSTER, CLUSTER) == third, "{version:?}");
        assert_eq!(read(&whole, 5 * CLUSTER + 1000, 2000), [0; 2000], "{version:?}");
        let discarded = read(&whole, 3 * CLUSTER, 1)[0];
        assert!([0, 3].contains(&discarded), "{version:?}: {discarded} shows the base");
        assert!(read(&whole, 4 * CLUSTER, CLUSTER) == vec![7; CLUSTER as usize], "{version:?}");
    }
}
