//! What a raw image in a regular file answers where files have an end, holes and rights.

use std::os::unix::fs::{FileExt, MetadataExt};

use imgfmt::{
    Access, Content, Durability, ErrorKind, ExtentKind, Format, Image, OpenOptions, Speed, ZeroMode,
};
use tempfile::NamedTempFile;

use crate::common::{at, range};

const MIB: u64 = 1 << 20;

fn raw(access: Access) -> OpenOptions {
    OpenOptions::new().format(Format::Raw).access(access)
}

fn file_of(length: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(length).unwrap();
    file
}

#[test]
fn requests_beyond_the_end_are_refused_and_change_nothing() {
    let file = file_of(1000);
    let image = Image::open(file.path(), &raw(Access::ReadWrite)).unwrap();
    let kinds = [
        image.read_at(at(999), &mut [0; 2]).unwrap_err().kind(),
        image.write_at(at(1000), b"x", Durability::Cached).unwrap_err().kind(),
        image.write_at(at(u64::MAX), b"x", Durability::Cached).unwrap_err().kind(),
        image.discard(range(500, 501), Durability::Cached).unwrap_err().kind(),
        image.extents(range(0, 1001)).next().unwrap().unwrap_err().kind(),
        image.map_read(range(1001, 0)).unwrap_err().kind(),
    ];
    assert_eq!(kinds, [ErrorKind::OutOfBounds; 6]);
    assert_eq!(file.as_file().metadata().unwrap().len(), 1000);
    image.read_at(at(1000), &mut []).unwrap();
}

#[test]
fn a_read_only_image_refuses_changes() {
    let file = file_of(1000);
    let image = Image::open(file.path(), &raw(Access::ReadOnly)).unwrap();
    let error = image.write_at(at(0), b"x", Durability::Cached).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
    let result = image.write_zeroes(range(0, 1), ZeroMode::MayUnmap, Speed::Any, Durability::Fua);
    assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    image.flush().unwrap();
}

#[test]
fn holes_are_reported_with_their_bounds() {
    let file = file_of(4 * MIB);
    file.as_file().write_all_at(&[1; 4096], MIB).unwrap();
    let image = Image::open(file.path(), &raw(Access::ReadOnly)).unwrap();
    let kinds: Vec<_> = image
        .extents(range(0, 4 * MIB))
        .map(Result::unwrap)
        .map(|extent| (extent.range.offset().bytes(), extent.kind))
        .collect();
    if kinds == [(0, ExtentKind::Data)] {
        println!("skipped: the file system of the temporary directory does not report holes");
        return;
    }
    let expected = [(0, ExtentKind::Hole), (MIB, ExtentKind::Data), (MIB + 4096, ExtentKind::Hole)];
    assert_eq!(kinds, expected);
    let mut bounded = image.extents(range(MIB - 1, 4097)).bounded(1, 1);
    assert_eq!(bounded.next().unwrap().unwrap().range, range(MIB - 1, 1));
    assert!(bounded.next().is_none());
}

#[test]
fn zeroes_that_may_unmap_free_space_and_others_keep_it() {
    let file = file_of(4 * MIB);
    let image = Image::open(file.path(), &raw(Access::ReadWrite)).unwrap();
    image.write_at(at(0), &vec![1; 4 * MIB as usize], Durability::Fua).unwrap();
    let used = || file.as_file().metadata().unwrap().blocks() * 512;
    let full = used();
    let keep = ZeroMode::KeepAllocated;
    image.write_zeroes(range(0, MIB), keep, Speed::Any, Durability::Fua).unwrap();
    assert!(used() >= full, "space was given back although it was to be kept");
    let fast = image.write_zeroes(
        range(MIB, MIB),
        ZeroMode::MayUnmap,
        Speed::FastOnly,
        Durability::Cached,
    );
    match fast {
        Ok(()) => assert!(used() < full, "a fast zero that gave nothing back"),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::NotFast);
            let mut byte = [0];
            image.read_at(at(MIB), &mut byte).unwrap();
            assert_eq!(byte, [1], "a refused fast zero has changed data");
        }
    }
}

#[test]
fn a_file_truncated_behind_our_back_is_an_error_and_not_zeroes() {
    let file = file_of(MIB);
    let image = Image::open(file.path(), &raw(Access::ReadOnly)).unwrap();
    file.as_file().set_len(1000).unwrap();
    let error = image.read_at(at(999), &mut [0; 2]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("truncated"), "{error}");
    assert_eq!(image.size(), MIB);
    let last = image.extents(range(0, MIB)).last();
    assert_eq!(last.unwrap().unwrap().kind, ExtentKind::Data);
}

#[test]
fn a_mapping_names_the_place_in_the_file() {
    let file = file_of(MIB);
    let image = Image::open(file.path(), &raw(Access::ReadWrite)).unwrap();
    image.write_at(at(12345), b"here", Durability::Cached).unwrap();
    let map = image.map_read(range(12345, 4)).unwrap();
    assert_eq!(map.mappings().len(), 1);
    let mapping = map.mappings().next().unwrap();
    assert_eq!((mapping.range, mapping.depth), (range(12345, 4), 1));
    let Content::File(span) = mapping.content else { panic!("{mapping:?}") };
    let fd = span.storage.as_fd().unwrap().try_clone_to_owned().unwrap();
    let mut bytes = [0; 4];
    std::fs::File::from(fd).read_exact_at(&mut bytes, span.offset.bytes()).unwrap();
    assert_eq!(&bytes, b"here");
}

#[test]
fn an_empty_file_is_a_disk_of_no_bytes() {
    let file = file_of(0);
    let image = Image::open(file.path(), &OpenOptions::new()).unwrap();
    assert_eq!((image.size(), image.format()), (0, Format::Raw));
    assert!(image.extents(range(0, 0)).next().is_none());
}
