//! A guest cannot turn a raw disk that was found by probing into an image of another format
//! (CVE-2008-2004).

use imgfmt::{
    Access, CreateOptions, Durability, ErrorKind, Format, Image, OpenOptions, OpenPolicy, Speed,
    ZeroMode,
};
use tempfile::NamedTempFile;

use crate::common::{at, range};

const QCOW2_START: &[u8] = b"QFI\xfb\0\0\0\x03";

fn probed() -> (NamedTempFile, Image) {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let image = Image::open(file.path(), &OpenOptions::new().access(Access::ReadWrite)).unwrap();
    assert_eq!(image.format(), Format::Raw);
    (file, image)
}

#[test]
fn a_header_of_another_format_is_refused_and_not_written() {
    let (_file, image) = probed();
    let error = image.write_at(at(0), QCOW2_START, Durability::Cached).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PolicyDenied);
    let mut start = [1; 8];
    image.read_at(at(0), &mut start).unwrap();
    assert_eq!(start, [0; 8]);
}

#[test]
fn a_header_put_together_from_parts_is_refused_too() {
    let (_file, image) = probed();
    image.write_at(at(1), b"FI\xfb\0\0\0\x03", Durability::Cached).unwrap();
    let error = image.write_at(at(0), b"Q", Durability::Cached).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PolicyDenied);
    image.write_at(at(0), b"QEDx", Durability::Cached).unwrap();
    let mode = ZeroMode::MayUnmap;
    let zero = image.write_zeroes(range(3, 1), mode, Speed::Any, Durability::Cached);
    assert_eq!(zero.unwrap_err().kind(), ErrorKind::PolicyDenied);
}

/// The first header of a tar archive.
fn tar_header() -> [u8; 512] {
    let mut header = [0; 512];
    header[..6].copy_from_slice(b"a.disk");
    header[124..135].copy_from_slice(b"00000001000");
    header[156] = b'0';
    header[257..263].copy_from_slice(b"ustar\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

#[test]
fn a_header_of_an_archive_is_refused_too() {
    let (_file, image) = probed();
    let header = tar_header();
    let error = image.write_at(at(0), &header, Durability::Cached).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PolicyDenied);
    image.write_at(at(1), &header[1..], Durability::Cached).unwrap();
    let error = image.write_at(at(0), &header[..1], Durability::Cached).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PolicyDenied);
}

#[test]
fn other_writes_and_the_rest_of_the_disk_are_free() {
    let (_file, image) = probed();
    image.write_at(at(0), b"\xeb\x63\x90 a boot sector", Durability::Fua).unwrap();
    image.write_at(at(512), QCOW2_START, Durability::Cached).unwrap();
}

#[test]
fn an_image_said_to_be_raw_takes_anything() {
    let (file, image) = probed();
    drop(image);
    let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
    let image = Image::open(file.path(), &options).unwrap();
    image.write_at(at(0), QCOW2_START, Durability::Cached).unwrap();
}

#[test]
fn a_backing_file_without_a_recorded_format_is_probed_only_if_the_policy_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let (base, top) = (directory.path().join("base.qcow2"), directory.path().join("top.qcow2"));
    let image = Image::create(&base, &CreateOptions::new(Format::Qcow2, 1 << 20)).unwrap();
    image.write_at(at(70_000), b"below", Durability::Cached).unwrap();
    image.close().unwrap();
    Image::create(&top, &CreateOptions::overlay("base.qcow2", Format::Qcow2)).unwrap();
    // The extension that has the format gets a type that nobody knows.
    let mut bytes = std::fs::read(&top).unwrap();
    let place = bytes[..4096].windows(4).position(|part| part == [0xe2, 0x79, 0x2a, 0xca]);
    bytes[place.unwrap()] = 0x12;
    std::fs::write(&top, bytes).unwrap();
    let error = Image::open(&top, &OpenOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PolicyDenied, "{error}");
    let policy = OpenPolicy::new().allow_format_probe();
    let image = Image::open(&top, &OpenOptions::new().policy(policy)).unwrap();
    let mut found = [0; 5];
    image.read_at(at(70_000), &mut found).unwrap();
    assert_eq!(&found, b"below");
}
