//! A guest cannot turn a raw disk that was found by probing into an image of another format
//! (CVE-2008-2004).

use imgfmt::{Access, Durability, ErrorKind, Format, Image, OpenOptions, Speed, ZeroMode};
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
