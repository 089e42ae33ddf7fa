//! Images of other programs' formats in forms that QEMU does not make, made by hand as their
//! specifications have them: parents of differencing images, and blocks of which a part was
//! written.

use std::path::Path;

use imgfmt::{
    Access, CreateOptions, Durability, ErrorKind, FileNames, Format, Image, OpenOptions, OpenPolicy,
};

use crate::bodies::foreign_images::{Vhd, parallels, vpc_fixed};
use crate::common::{all_extents, at, has_tool, qemu, range};

const BLOCK: u64 = 4096;
const SIZE: u64 = 9 * BLOCK;

fn content(path: &Path) -> imgfmt::Result<Vec<u8>> {
    let image = Image::open(path, &OpenOptions::new())?;
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(at(0), &mut bytes).map(|()| bytes)
}

/// Sectors, each filled with one value: how many of which.
fn sectors(parts: &[(usize, u8)]) -> Vec<u8> {
    parts.iter().flat_map(|(count, value)| vec![*value; count * 512]).collect()
}

#[test]
fn sectors_of_a_vhd_that_were_never_written_are_zeroes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vhd");
    let image = Vhd::new(3, SIZE).block(1, &[0b1011_0000]).block(3, &[0xff]);
    std::fs::write(&path, image.bytes()).unwrap();
    let expected = sectors(&[(8, 0), (1, 0x40), (1, 0), (2, 0x40), (12, 0), (8, 0x41), (40, 0)]);
    assert!(content(&path).unwrap() == expected);
    let image = Image::open(&path, &OpenOptions::new()).unwrap();
    let extents = all_extents(&image, range(0, SIZE));
    // They are the image's own, although it does not have them.
    assert!(extents.iter().all(|extent| extent.depth == 1), "{extents:?}");
    assert_eq!(extents.len(), 7, "{extents:?}");
}

#[test]
fn a_differencing_vhd_shows_its_parent_sector_by_sector() {
    let directory = tempfile::tempdir().unwrap();
    let (base, top) = (directory.path().join("base.vhd"), directory.path().join("top.vhd"));
    let differences = Vhd::new(4, SIZE).over("base.vhd").block(2, &[0x3c]).block(5, &[0x80]);
    std::fs::write(&top, differences.bytes()).unwrap();
    std::fs::write(&base, vpc_fixed(SIZE)).unwrap();
    let expected = sectors(&[(18, 5), (4, 0x40), (18, 5), (1, 0x41), (31, 5)]);
    assert!(content(&top).unwrap() == expected, "over a fixed one");
    let dynamic = Vhd::new(3, SIZE).uuid(1).block(0, &[0xff]).block(5, &[0xff]);
    std::fs::write(&base, dynamic.bytes()).unwrap();
    let expected =
        sectors(&[(8, 0x40), (10, 0), (4, 0x40), (18, 0), (1, 0x41), (7, 0x41), (24, 0)]);
    assert!(content(&top).unwrap() == expected, "over a dynamic one");
    let image = Image::open(&top, &OpenOptions::new()).unwrap();
    assert_eq!(image.layer_sizes(), [SIZE, SIZE]);
    let info = Image::inspect_file(&top, &OpenOptions::new()).unwrap();
    assert_eq!((info.format, info.size), (Format::Vpc, SIZE));
}

#[test]
fn another_image_than_the_parent_of_a_vhd_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (base, top) = (directory.path().join("base.vhd"), directory.path().join("top.vhd"));
    std::fs::write(&top, Vhd::new(4, SIZE).over("base.vhd").bytes()).unwrap();
    let error = content(&top).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    std::fs::write(&base, Vhd::new(3, SIZE).uuid(9).bytes()).unwrap();
    let error = content(&top).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{error}");
    assert!(error.to_string().contains("another image"), "{error}");
    std::fs::write(&base, b"not an image".repeat(100)).unwrap();
    assert_eq!(content(&top).unwrap_err().kind(), ErrorKind::InvalidFormat);
}

#[test]
fn a_parent_is_looked_for_where_the_policy_allows_it() {
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    let top = inner.join("top.vhd");
    std::fs::write(directory.path().join("base.vhd"), vpc_fixed(SIZE)).unwrap();
    std::fs::write(&top, Vhd::new(4, SIZE).over("..\\base.vhd").bytes()).unwrap();
    let error = content(&top).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PolicyDenied, "{error}");
    let options = OpenOptions::new().policy(OpenPolicy::any_file());
    assert_eq!(Image::open(&top, &options).unwrap().layer_sizes(), [SIZE, SIZE]);
}

#[test]
fn a_vhd_that_is_its_own_parent_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let top = directory.path().join("top.vhd");
    std::fs::write(&top, Vhd::new(4, SIZE).uuid(1).over("top.vhd").bytes()).unwrap();
    let error = content(&top).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{error}");
    assert!(error.to_string().contains("back to itself"), "{error}");
}

#[test]
fn a_raw_disk_whose_guest_wrote_the_footer_of_a_vhd_keeps_its_last_sector() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    std::fs::write(&path, vec![9; SIZE as usize + 512]).unwrap();
    let write = OpenOptions::new().access(Access::ReadWrite);
    let disk = vpc_fixed(SIZE);
    let image = Image::open(&path, &write).unwrap();
    image.write_at(at(0), &disk, Durability::Cached).unwrap();
    image.close().unwrap();
    for options in [&OpenOptions::new(), &write] {
        let image = Image::open(&path, options).unwrap();
        assert_eq!((image.format(), image.size()), (Format::Raw, SIZE + 512));
        drop(image);
        let info = Image::inspect_file(&path, options).unwrap();
        assert_eq!((info.format, info.size), (Format::Raw, SIZE + 512));
    }
    assert!(content(&path).unwrap() == disk);
    // As the backing file of an image that does not say its format.
    let top = directory.path().join("top.qcow2");
    let overlay = CreateOptions::overlay("disk.raw", Format::Raw);
    assert_eq!(Image::create(&top, &overlay).unwrap().layer_sizes(), [SIZE + 512; 2]);
    // Its user can say what it is, by an option or by its name.
    let as_vhd = Image::open(&path, &OpenOptions::new().format(Format::Vpc)).unwrap();
    assert_eq!(as_vhd.size(), SIZE);
    let renamed = directory.path().join("disk.Vhd");
    std::fs::rename(&path, &renamed).unwrap();
    assert_eq!(content(&renamed).unwrap().len() as u64, SIZE);
    let mut as_qemu = OpenOptions::new();
    as_qemu.names = FileNames::AsInQemu;
    assert_eq!(Image::open(&renamed, &as_qemu).unwrap().size(), SIZE + 512);
}

#[test]
fn a_raw_disk_whose_guest_wrote_the_footer_of_a_vhd_with_a_parent_is_not_opened_as_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vhd");
    let image = Vhd::new(4, SIZE).over("base.vhd").bytes();
    let mut disk = vec![0; 1 << 16];
    disk.extend(&image[image.len() - 512..]);
    std::fs::write(&path, disk).unwrap();
    let error = Image::open(&path, &OpenOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{error}");
}

#[test]
fn a_raw_disk_in_which_the_footer_of_a_fixed_vhd_lies_is_not_cut_short() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vhd");
    let as_vhd = OpenOptions::new().format(Format::Vpc);
    for (size, is_short) in [(512, false), (512, true), (1024, false), (1 << 16, false)] {
        let footer = vpc_fixed(size).split_off(size as usize);
        let footer = if is_short { &footer[..511] } else { &footer[..] };
        let disk = [&vec![3; (1 << 16) - footer.len()], footer].concat();
        std::fs::write(&path, &disk).unwrap();
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        assert_eq!((image.format(), image.size()), (Format::Raw, 1 << 16), "{size}");
        assert!(content(&path).unwrap() == disk, "{size}");
        let error = Image::open(&path, &as_vhd).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{size}: {error}");
    }
    // At the start it is taken for an image, and refused.
    for size in [512, (1 << 16) - 512] {
        let mut disk = vpc_fixed(size).split_off(size as usize);
        disk.resize(1 << 16, 3);
        std::fs::write(&path, &disk).unwrap();
        let error = Image::open(&path, &OpenOptions::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{size}: {error}");
    }
    // Old programs wrote a byte less.
    let mut short = vpc_fixed(SIZE);
    short.pop();
    std::fs::write(&path, &short).unwrap();
    assert!(content(&path).unwrap() == vec![5; SIZE as usize]);
}

#[test]
fn a_parallels_image_that_calls_itself_empty_shows_what_its_table_has() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.hds");
    for magic in [b"WithoutFreeSpace", b"WithouFreSpacExt"] {
        let unit = if magic.ends_with(b"Ext") { 1 } else { 8 };
        let mut image = parallels(magic, 3 * BLOCK, &[unit, 0, 2 * unit]);
        image[52] |= 1;
        std::fs::write(&path, image).unwrap();
        let expected = sectors(&[(8, 1), (8, 0), (8, 3)]);
        assert!(content(&path).unwrap() == expected);
        if has_tool("qemu-img") {
            assert!(qemu::content(&path, "parallels") == expected, "QEMU");
        }
    }
}
