//! Chains of hundreds of layers are read; a layer that could not be read is not made.

use std::path::{Path, PathBuf};

use imgfmt::{
    Access, CacheMode, CreateOptions, Durability, ErrorKind, Format, GuestRange, Image,
    OpenOptions, OpenPolicy,
};
use tempfile::TempDir;

use crate::bodies::foreign_images::{Vhd, qed};
use crate::bodies::foreign_vmdk::{GRAIN, Hosted, hosted};
use crate::common::{all_extents, at, range};

const SIZE: u64 = 16 << 20;
const CLUSTER: u64 = 64 << 10;
/// As the documentation of `Image::check_new_backing` has it.
const LAYERS_MAX: usize = 500;

fn layer(directory: &Path, number: usize) -> PathBuf {
    directory.join(name(number))
}

fn name(number: usize) -> String {
    format!("l{number:04}.qcow2")
}

/// A chain of empty layers above the first one, which holds something.
fn chain(layers: usize) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    Image::create(layer(directory.path(), 0), &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    let first = layer(directory.path(), 0);
    let image = Image::open(&first, &OpenOptions::new().access(Access::ReadWrite)).unwrap();
    image.write_at(at(CLUSTER), &[7; 4096], Durability::Cached).unwrap();
    image.close().unwrap();
    let overlay = CreateOptions::overlay(name(0), Format::Qcow2);
    Image::create(layer(directory.path(), 1), &overlay).unwrap();
    let template = std::fs::read(layer(directory.path(), 1)).unwrap();
    let place = template.windows(11).position(|part| part == name(0).as_bytes()).unwrap();
    for number in 2..layers {
        let mut bytes = template.clone();
        bytes[place..place + 11].copy_from_slice(name(number - 1).as_bytes());
        std::fs::write(layer(directory.path(), number), bytes).unwrap();
    }
    directory
}

#[test]
fn a_disk_written_in_200_layers_reads_as_one() {
    const LAYERS: usize = 200;
    let directory = chain(LAYERS);
    let mut expected = vec![0; SIZE as usize];
    expected[CLUSTER as usize..][..4096].fill(7);
    for number in (0..LAYERS).step_by(8) {
        let path = layer(directory.path(), number);
        let options = OpenOptions::new().access(Access::ReadWrite).cache(CacheMode::Unsafe);
        let image = Image::open(&path, &options).unwrap();
        // Each splits what the ones above have not got.
        let start = (number as u64 * 37 * CLUSTER / 2) % (SIZE - CLUSTER);
        let data = vec![number as u8; 5000];
        image.write_at(at(start), &data, Durability::Cached).unwrap();
        expected[start as usize..][..5000].copy_from_slice(&data);
        image.close().unwrap();
    }
    let top = Image::open(layer(directory.path(), LAYERS - 1), &OpenOptions::new()).unwrap();
    let mut content = vec![1; SIZE as usize];
    top.read_at(at(0), &mut content).unwrap();
    assert!(content == expected);
    reads_the_same_in_small_pieces(&top, &expected);
    let whole = GuestRange::new(at(0), SIZE).unwrap();
    let extents = all_extents(&top, whole);
    // Short ranges are looked up in another way.
    for extent in &extents {
        let (start, end) = (extent.range.offset().bytes(), extent.range.end().bytes());
        for start in [start, end - 512] {
            let part = GuestRange::new(at(start), 512).unwrap();
            let found = all_extents(&top, part);
            assert_eq!((found.len(), found[0].range), (1, part));
            assert_eq!((found[0].kind, found[0].depth), (extent.kind, extent.depth));
        }
    }
    // What the lowest layers hold others may have covered.
    assert!(extents.iter().any(|extent| extent.depth > 150));
    assert!(top.map_read(whole).unwrap().mappings().len() > 0);
}

/// Twice: what was found the first time is known the second time.
fn reads_the_same_in_small_pieces(image: &Image, expected: &[u8]) {
    for length in [4096, 4096, 200 << 10] {
        let mut part = vec![1; length];
        for (index, expected) in expected.chunks_exact(length).enumerate() {
            image.read_at(at((index * length) as u64), &mut part).unwrap();
            assert!(part == expected, "{length} bytes, number {index}");
        }
    }
}

#[test]
fn what_is_written_to_the_top_of_a_chain_shows_where_the_depth_was_known() {
    let directory = chain(50);
    let (top, options) =
        (layer(directory.path(), 49), OpenOptions::new().access(Access::ReadWrite));
    let mut image = Image::open(&top, &options.cache(CacheMode::Unsafe)).unwrap();
    let mut expected = vec![0; SIZE as usize];
    expected[CLUSTER as usize..][..4096].fill(7);
    reads_the_same_in_small_pieces(&image, &expected);
    image.create_snapshot("before").unwrap();
    for (start, byte) in [(CLUSTER + 100, 8), (3 * CLUSTER + 7, 9)] {
        image.write_at(at(start), &[byte; 300], Durability::Cached).unwrap();
        expected[start as usize..][..300].fill(byte);
    }
    reads_the_same_in_small_pieces(&image, &expected);
    let start = CLUSTER as usize;
    image
        .write_zeroes(
            GuestRange::new(at(CLUSTER), CLUSTER).unwrap(),
            imgfmt::ZeroMode::MayUnmap,
            imgfmt::Speed::Any,
            Durability::Cached,
        )
        .unwrap();
    expected[start..2 * start].fill(0);
    reads_the_same_in_small_pieces(&image, &expected);
    image.apply_snapshot("before").unwrap();
    expected.fill(0);
    expected[start..][..4096].fill(7);
    reads_the_same_in_small_pieces(&image, &expected);
    image.close().unwrap();
}

#[test]
fn the_longest_chain_is_read_and_no_layer_is_made_above_it() {
    let directory = chain(LAYERS_MAX);
    let (top, above) =
        (layer(directory.path(), LAYERS_MAX - 1), directory.path().join("above.qcow2"));
    let options = OpenOptions::new().access(Access::ReadWrite);
    let image = Image::open(&top, &options).unwrap();
    let mut content = [0; 8192];
    image.read_at(at(CLUSTER), &mut content).unwrap();
    assert_eq!((content[0], content[4095], content[4096]), (7, 7, 0));
    // Copies what is around it from the lowest layer.
    image.write_at(at(CLUSTER + 1), &[9], Durability::Cached).unwrap();
    image.read_at(at(CLUSTER), &mut content).unwrap();
    assert_eq!(content[..3], [7, 9, 7]);
    image.close().unwrap();

    let overlay = CreateOptions::overlay(name(LAYERS_MAX - 1), Format::Qcow2);
    let error = Image::create(&above, &overlay).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("more than 500 layers"), "{error}");
    assert_eq!(error.path(), Some(&*top));
    assert!(!above.exists());
    // By the way of an overlay of something else.
    Image::create(&above, &CreateOptions::overlay(name(0), Format::Qcow2)).unwrap();
    let before = std::fs::read(&above).unwrap();
    let last = name(LAYERS_MAX - 1);
    let backing = Some((last.as_ref(), Format::Qcow2));
    let error = Image::change_backing_file(&above, &OpenOptions::new(), backing).unwrap_err();
    assert!(error.to_string().contains("more than 500 layers"), "{error}");
    assert!(std::fs::read(&above).unwrap() == before);
    let last = name(LAYERS_MAX - 2);
    let backing = Some((last.as_ref(), Format::Qcow2));
    Image::change_backing_file(&above, &OpenOptions::new(), backing).unwrap();
    Image::open(&above, &OpenOptions::new()).unwrap();
}

#[test]
fn a_chain_that_is_too_long_already_is_refused_with_its_name() {
    let directory = chain(LAYERS_MAX + 1);
    let top = layer(directory.path(), LAYERS_MAX);
    let error = Image::open(&top, &OpenOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(error.path(), Some(&*top));
}

#[test]
fn a_loop_is_found_far_down() {
    let directory = chain(200);
    // Closed when nobody looks.
    let backing = Some(("link".as_ref(), Format::Qcow2));
    let first = layer(directory.path(), 0);
    Image::change_backing_file(&first, &OpenOptions::new(), backing).unwrap();
    std::os::unix::fs::symlink(name(150), directory.path().join("link")).unwrap();
    let error = Image::open(layer(directory.path(), 199), &OpenOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFormat);
    assert!(error.to_string().contains("leads back to itself"), "{error}");
}

/// A layer of a format that is only read, over another one; the first has something in its first 4
/// KiB.
type Made = fn(Option<&str>) -> Vec<u8>;

#[test]
fn the_longest_chain_of_a_format_that_is_only_read_is_read_and_closed() {
    const SIZE: u64 = GRAIN as u64;
    let formats: [(Made, u8); 3] = [
        (
            |below| {
                let mut image = qed(SIZE, &[if below.is_some() { 0 } else { 16_384 }], below);
                // Its base may have any format.
                image[16] &= 1;
                image
            },
            7,
        ),
        (
            |below| match below {
                Some(below) => Vhd::new(4, SIZE).uuid(1).over(below).bytes(),
                None => Vhd::new(3, SIZE).uuid(1).block(0, &[0xff]).bytes(),
            },
            0x40,
        ),
        (
            |below| {
                let (id, name) = below.map_or(("ffffffff", ""), |below| ("0000000a", below));
                let descriptor = format!(
                    "# Disk DescriptorFile\nversion=1\nCID=0000000a\nparentCID={id}\n\
                     parentFileNameHint=\"{name}\"\nRW 8 SPARSE \"disk\"\n"
                );
                let grain = if below.is_some() { 0 } else { 9 };
                hosted(&Hosted { descriptor, ..Hosted::new(&[grain]) })
            },
            9,
        ),
    ];
    for (make, content) in formats {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..LAYERS_MAX {
            let below = number.checked_sub(1).map(name);
            std::fs::write(layer(directory.path(), number), make(below.as_deref())).unwrap();
        }
        let top = layer(directory.path(), LAYERS_MAX - 1);
        let options = OpenOptions::new().policy(OpenPolicy::new().allow_format_probe());
        let image = Image::open(&top, &options).unwrap();
        let mut byte = [0];
        image.read_at(at(0), &mut byte).unwrap();
        assert_eq!(byte[0], content);
        let extents = all_extents(&image, range(0, SIZE));
        assert_eq!(extents[0].depth as usize, LAYERS_MAX);
        assert!(image.map_read(range(0, SIZE)).unwrap().mappings().len() > 0);
        image.try_read_at(at(0), &mut byte).unwrap();
    }
}
