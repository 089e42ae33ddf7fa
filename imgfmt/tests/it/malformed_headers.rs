//! Headers that no sound program writes are refused with one sentence, and nothing is changed; what
//! QEMU refuses, we refuse.

use std::process::Command;
use std::sync::Arc;

use imgfmt::testing::Recorder;
use imgfmt::{Access, ErrorKind, Format, Image, OpenOptions};

use crate::common;
use crate::handmade::{Handmade, field};

/// What must come of opening: an error of this kind, or success.
type Outcome = Option<ErrorKind>;

const BAD: Outcome = Some(ErrorKind::InvalidFormat);
const UNKNOWN: Outcome = Some(ErrorKind::Unsupported);

struct Case {
    name: &'static str,
    change: fn(&mut Handmade),
    /// Read-only.
    outcome: Outcome,
    for_writing: Outcome,
}

/// The same comes of both ways to open it.
const fn case(name: &'static str, outcome: Outcome, change: fn(&mut Handmade)) -> Case {
    Case { name, change, outcome, for_writing: outcome }
}

fn sound() -> Handmade {
    let mut image = Handmade::new(16, 1 << 20);
    image.add_data(0, 7);
    image
}

fn extension(image: &mut Handmade, kind: u32, length: u32, content: &[u8]) {
    image.put32(field::EXTENSIONS, kind);
    image.put32(field::EXTENSIONS + 4, length);
    image.bytes[field::EXTENSIONS + 8..][..content.len()].copy_from_slice(content);
}

fn backing_name(image: &mut Handmade, offset: u64, length: u32) {
    image.put64(field::BACKING_OFFSET, offset);
    image.put32(field::BACKING_LENGTH, length);
}

/// A snapshot table in a cluster of its own with one entry: L1 offset, L1 size, extra data.
fn snapshot(image: &mut Handmade, l1_offset: u64, l1_size: u32, extra: u32) {
    let table = image.bytes.len();
    image.bytes.resize(table + image.cluster(), 0);
    image.put64(field::SNAPSHOTS_OFFSET, table as u64);
    image.put32(field::SNAPSHOT_COUNT, 1);
    image.put64(table, l1_offset);
    image.put32(table + 8, l1_size);
    image.put32(table + 36, extra);
    image.put64(table + 40 + 8, 1 << 20); // disk size, the second word of the extra data
}

const CASES: &[Case] = &[
    case("sound", None, |_| {}),
    case("version 0", UNKNOWN, |i| i.put32(field::VERSION, 0)),
    case("version 1", UNKNOWN, |i| i.put32(field::VERSION, 1)),
    case("version 4", UNKNOWN, |i| i.put32(field::VERSION, 4)),
    case("clusters of 1 byte", BAD, |i| i.put32(field::CLUSTER_BITS, 0)),
    case("clusters of 256 bytes", BAD, |i| i.put32(field::CLUSTER_BITS, 8)),
    case("clusters of 4 MiB", BAD, |i| i.put32(field::CLUSTER_BITS, 22)),
    case("clusters of 2^64 bytes", BAD, |i| i.put32(field::CLUSTER_BITS, 64)),
    case("clusters of 2^(2^32) bytes", BAD, |i| i.put32(field::CLUSTER_BITS, u32::MAX)),
    case("size 2^62", BAD, |i| i.put64(field::SIZE, 1 << 62)),
    case("size 2^63", BAD, |i| i.put64(field::SIZE, 1 << 63)),
    case("size 2^64 - 1", BAD, |i| i.put64(field::SIZE, u64::MAX)),
    case("a size that is not a multiple of 512", None, |i| i.put64(field::SIZE, (1 << 20) - 5)),
    Case {
        name: "AES",
        change: |i| i.put32(field::CRYPT_METHOD, 1),
        outcome: Some(ErrorKind::KeyRequired),
        for_writing: Some(ErrorKind::ReadOnly),
    },
    case("LUKS without its header", BAD, |i| i.put32(field::CRYPT_METHOD, 2)),
    case("an encryption that does not exist", BAD, |i| i.put32(field::CRYPT_METHOD, 3)),
    case("a size that ends 5 bytes behind what the L1 table covers", BAD, |i| {
        i.put64(field::SIZE, (512 << 20) + 5);
    }),
    case("no L1 table", BAD, |i| i.put32(field::L1_SIZE, 0)),
    case("an L1 table of 32 GiB", BAD, |i| i.put32(field::L1_SIZE, u32::MAX)),
    case("an L1 table of more than 32 MiB", BAD, |i| i.put32(field::L1_SIZE, (4 << 20) + 1)),
    case("an L1 table behind the end", BAD, |i| i.put64(field::L1_OFFSET, 1 << 40)),
    case("an L1 table at 2^64", BAD, |i| i.put64(field::L1_OFFSET, !0xffff)),
    case("an L1 table that is not aligned", BAD, |i| i.put64(field::L1_OFFSET, 0x30200)),
    case("refcounts behind the end", BAD, |i| i.put64(field::REFCOUNT_TABLE_OFFSET, 1 << 40)),
    case("refcounts at 2^64", BAD, |i| i.put64(field::REFCOUNT_TABLE_OFFSET, !0xffff)),
    case("refcounts not aligned", BAD, |i| i.put64(field::REFCOUNT_TABLE_OFFSET, 0x10008)),
    case("no refcounts", BAD, |i| i.put32(field::REFCOUNT_TABLE_CLUSTERS, 0)),
    case("too many refcounts", BAD, |i| i.put32(field::REFCOUNT_TABLE_CLUSTERS, 129)),
    case("far too many refcounts", BAD, |i| i.put32(field::REFCOUNT_TABLE_CLUSTERS, u32::MAX)),
    case("refcounts of 128 bits", BAD, |i| i.put32(field::REFCOUNT_ORDER, 7)),
    case("refcounts of 2^255 bits", BAD, |i| i.put32(field::REFCOUNT_ORDER, 255)),
    case("a header of 72 bytes", BAD, |i| i.put32(field::HEADER_LENGTH, 72)),
    case("a header of 103 bytes", BAD, |i| i.put32(field::HEADER_LENGTH, 103)),
    case("a header longer than a cluster", BAD, |i| i.put32(field::HEADER_LENGTH, 65544)),
    case("a header of 4 GiB", BAD, |i| i.put32(field::HEADER_LENGTH, u32::MAX)),
    case("unknown incompatible bit 5", UNKNOWN, |i| i.put64(field::INCOMPATIBLE, 1 << 5)),
    case("unknown incompatible bit 61", UNKNOWN, |i| i.put64(field::INCOMPATIBLE, 1 << 61)),
    case("the mark of an interrupted change of the backing file, incompatible bit 62", BAD, |i| {
        i.put64(field::INCOMPATIBLE, 1 << 62);
    }),
    case("the mark of an interrupted writer, incompatible bit 63", BAD, |i| {
        i.put64(field::INCOMPATIBLE, 1 << 63);
    }),
    case("unknown compatible bits", None, |i| i.put64(field::COMPATIBLE, !1)),
    case("subclusters in small clusters", BAD, |i| {
        *i = Handmade::new(13, 1 << 16).extended();
    }),
    case("compression type without its bit", BAD, |i| i.bytes[field::COMPRESSION_TYPE] = 1),
    case("compression bit without a type", BAD, |i| i.put64(field::INCOMPATIBLE, 1 << 3)),
    case("an unknown compression type", UNKNOWN, |i| {
        i.put64(field::INCOMPATIBLE, 1 << 3);
        i.bytes[field::COMPRESSION_TYPE] = 2;
    }),
    case("a data file without a name", BAD, |i| i.put64(field::INCOMPATIBLE, 1 << 2)),
    case("an extension longer than its area", BAD, |i| extension(i, 0x1234_5678, 1 << 20, b"")),
    case("an extension of 4 GiB", BAD, |i| extension(i, 0x1234_5678, u32::MAX, b"")),
    case("an unknown extension", None, |i| extension(i, 0x1234_5678, 9, b"something")),
    case("a backing name of 1024 bytes", BAD, |i| backing_name(i, 1024, 1024)),
    case("a backing name of 4 GiB", BAD, |i| backing_name(i, 1024, u32::MAX)),
    case("a backing name behind the first cluster", BAD, |i| backing_name(i, 0x10000, 5)),
    case("a backing name across the first cluster's end", BAD, |i| backing_name(i, 0xfffe, 5)),
    case("a backing name at 2^64", BAD, |i| backing_name(i, u64::MAX - 2, 5)),
    case("a backing name that is not text", Some(ErrorKind::PolicyDenied), |i| {
        backing_name(i, 1024, 2);
        i.bytes[1024..1026].copy_from_slice(&[0xff, 0xfe]);
    }),
    case("65537 snapshots", BAD, |i| {
        i.put32(field::SNAPSHOT_COUNT, 65537);
        i.put64(field::SNAPSHOTS_OFFSET, 0x50000);
    }),
    case("snapshots behind the end", BAD, |i| {
        i.put32(field::SNAPSHOT_COUNT, 1);
        i.put64(field::SNAPSHOTS_OFFSET, 1 << 40);
    }),
    case("snapshots that are not aligned", BAD, |i| {
        i.put32(field::SNAPSHOT_COUNT, 1);
        i.put64(field::SNAPSHOTS_OFFSET, 0x50008);
    }),
    case("a sound snapshot", None, |i| snapshot(i, 0x30000, 1, 16)),
    case("a snapshot with 4 GiB of extra data", BAD, |i| snapshot(i, 0x30000, 1, u32::MAX)),
    case("a snapshot with 1025 bytes of extra data", BAD, |i| snapshot(i, 0x30000, 1, 1025)),
    case("a snapshot with a huge L1 table", BAD, |i| snapshot(i, 0x30000, u32::MAX, 16)),
    case("a snapshot with an L1 table behind the end", BAD, |i| snapshot(i, 1 << 40, 1, 16)),
];

/// Opens bytes; nothing may be changed if that fails, and the error must be one line.
fn open(what: &str, bytes: &[u8], access: Access) -> Outcome {
    let storage = Recorder::new().storage(bytes);
    let options = OpenOptions::new().format(Format::Qcow2).access(access);
    match Image::from_storage(Arc::clone(&storage) as _, &options) {
        Ok(_) => None,
        Err(error) => {
            let text = error.to_string();
            assert!(!text.contains('\n') && text.len() < 400, "{text}");
            assert!(storage.content() == bytes, "{what}: a refused image was changed");
            Some(error.kind())
        }
    }
}

#[test]
fn impossible_headers_are_refused_and_odd_ones_are_not() {
    for case in CASES {
        let mut image = sound();
        (case.change)(&mut image);
        let ways = [(Access::ReadOnly, case.outcome), (Access::ReadWrite, case.for_writing)];
        for (access, outcome) in ways {
            let found = open(case.name, &image.bytes, access);
            assert_eq!(found, outcome, "{}, {access:?}", case.name);
        }
    }
}

#[test]
fn what_qemu_refuses_is_refused() {
    if !common::has_tool("qemu-img") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    for case in CASES {
        let mut image = sound();
        (case.change)(&mut image);
        std::fs::write(&path, &image.bytes).unwrap();
        let output = Command::new("qemu-io")
            .args(["-r", "-f", "qcow2", "-c", "length"])
            .arg(&path)
            .output()
            .unwrap();
        if !output.status.success() {
            assert!(case.outcome.is_some(), "QEMU refuses: {}", case.name);
        }
    }
}

#[test]
fn a_header_cut_off_anywhere_is_refused() {
    let bytes = sound().bytes;
    for length in 0..=field::EXTENSIONS {
        assert_eq!(open("cut off", &bytes[..length], Access::ReadOnly), BAD, "{length} bytes");
    }
}

#[test]
fn tables_cut_off_are_refused_or_read_as_zero() {
    let bytes = sound().bytes;
    for length in (113..bytes.len()).step_by(997) {
        let outcome = open("cut off", &bytes[..length], Access::ReadOnly);
        assert!(outcome.is_none() || outcome == BAD, "{length} bytes: {outcome:?}");
        assert!(outcome == BAD || length > 0x30000, "without an L1 table, at {length} bytes");
    }
}

#[test]
fn an_image_marked_as_corrupt_is_only_read() {
    let mut image = sound();
    image.put64(field::INCOMPATIBLE, 1 << 1);
    assert_eq!(open("marked", &image.bytes, Access::ReadOnly), None);
    assert_eq!(open("marked", &image.bytes, Access::ReadWrite), Some(ErrorKind::Corrupt));
}

#[test]
fn version_2_has_no_feature_bits() {
    let mut image = sound();
    image.put32(field::VERSION, 2);
    // What follows the 72 bytes are header extensions: this one ends them.
    image.bytes[72..112].fill(0);
    assert_eq!(open("marked", &image.bytes, Access::ReadWrite), None);
    image.put32(76, 4); // the length of an extension of type 0 means nothing
    assert_eq!(open("marked", &image.bytes, Access::ReadWrite), None);
}

#[test]
fn unknown_autoclear_bits_are_cleared_before_the_first_write_and_only_then() {
    let mut image = sound();
    image.put64(field::AUTOCLEAR, 1 << 40);
    let recorder = Recorder::new();
    let storage = recorder.storage(&image.bytes);
    let options = OpenOptions::new().format(Format::Qcow2);
    drop(Image::from_storage(Arc::clone(&storage) as _, &options).unwrap());
    assert_eq!(recorder.position(), 0, "opening read-only changed the image");
    let disk =
        Image::from_storage(Arc::clone(&storage) as _, &options.access(Access::ReadWrite)).unwrap();
    disk.write_at(common::at(0), &[1; 512], imgfmt::Durability::Cached).unwrap();
    let field = field::AUTOCLEAR..field::AUTOCLEAR + 8;
    assert_eq!(storage.content()[field], [0; 8]);
    for position in 0..=recorder.position() {
        let bytes = storage.after_crash(position, imgfmt::testing::Loss::Everything, &mut |_| 0);
        let is_marked = bytes[field::AUTOCLEAR + 2] == 1;
        assert!(!is_marked || bytes == image.bytes, "the mark outlived a change");
    }
}
