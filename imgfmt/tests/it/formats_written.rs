//! New images of other programs' formats: QEMU reads in them what was written, finds them sound,
//! and writes the same headers; what is not possible is refused before there is a file.
//!
//! `IMGFMT_FORMAT_ROUNDS` sets how many of each kind.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use imgfmt::jobs::{Background, ConvertOptions, JobContext, SourceReader, convert};
use imgfmt::storage::MemoryStorage;
use imgfmt::zero::Content;
use imgfmt::{
    Access, CacheMode, CreateOptions, Durability, ErrorKind, ExtentKind, Format, GuestOffset,
    Image, OpenOptions, Preallocation, Speed, Subformat, VhdSize, VmdkAdapter, ZeroMode,
};

use crate::common::{self, Random, all_extents, at, range, run, text};
use crate::judge::subjects::rounds;

/// The kinds of images that are made: format, what QEMU calls it, and how.
type Kind = (Format, &'static str, fn(&mut CreateOptions));

/// The largest disk of a VMDK in one file, in bytes.
const VMDK_MAX: u64 = 2_198_754_295_808;

const KINDS: &[Kind] = &[
    (Format::Vdi, "static=off", |_| {}),
    (Format::Vdi, "static=on", fixed),
    (Format::Vpc, "force_size=on", |create| create.foreign.vhd_size = VhdSize::Exact),
    (Format::Vpc, "subformat=dynamic", |create| create.foreign.vhd_size = VhdSize::Geometry),
    (Format::Vpc, "subformat=fixed,force_size=on", |create| {
        create.foreign.vhd_size = VhdSize::Exact;
        fixed(create);
    }),
    (Format::Vpc, "subformat=fixed", |create| {
        create.foreign.vhd_size = VhdSize::Geometry;
        fixed(create);
    }),
    (Format::Vhdx, "subformat=dynamic", |_| {}),
    (Format::Vhdx, "subformat=dynamic,block_size=1M,log_size=2M", |create| {
        create.foreign.block_size = Some(1 << 20);
        create.foreign.log_size = Some(2 << 20);
    }),
    (Format::Vhdx, "subformat=fixed", fixed),
    (Format::Vmdk, "subformat=monolithicSparse", |_| {}),
    (Format::Vmdk, "zeroed_grain=on,adapter_type=lsilogic,hwversion=10", |create| {
        create.foreign.zeroed_grains = true;
        create.foreign.adapter = VmdkAdapter::LsiLogic;
        create.foreign.hardware_version = Some("10".into());
    }),
];

fn fixed(create: &mut CreateOptions) {
    create.foreign.subformat = Subformat::Fixed;
}

fn options((format, _, set): &Kind, size: u64) -> CreateOptions {
    let mut create = CreateOptions::new(*format, size);
    // Nothing has to survive a crash.
    create.open.cache = CacheMode::Unsafe;
    set(&mut create);
    create
}

fn has_qemu_img() -> bool {
    common::has_tool("qemu-img")
}

/// Writes at random, and the same to a row of bytes.
fn fill(image: &Image, random: &mut Random) -> Vec<u8> {
    let size = image.size();
    let mut model = vec![0; size as usize];
    for _ in 0..random.below(30) {
        let offset = random.below(size);
        let length = (random.below(400_000) + 1).min(size - offset);
        let part = &mut model[offset as usize..][..length as usize];
        match random.below(6) {
            0 => {
                let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
                image.write_zeroes(range(offset, length), mode, speed, Durability::Cached).unwrap();
                part.fill(0);
            }
            1 => image.flush().unwrap(),
            _ => {
                part.copy_from_slice(&random.bytes(length as usize));
                image.write_at(at(offset), part, Durability::Cached).unwrap();
            }
        }
    }
    model
}

/// What `qemu-img check` finds, if the format has that.
fn check(path: &Path, format: Format, what: &str) {
    if format == Format::Vpc {
        return;
    }
    let output = Command::new("qemu-img").args(["check", "-f", format.name(), text(path)]).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_is_written_is_read_by_qemu_and_by_this_crate() {
    if !has_qemu_img() {
        return;
    }
    let mut random = Random::new("written");
    for round in 0..rounds("IMGFMT_FORMAT_ROUNDS", 2) {
        for kind in KINDS {
            let (format, how, _) = kind;
            let directory = tempfile::tempdir().unwrap();
            let disk = format!("disk.{format}");
            let [path, raw] = [&*disk, "raw"].map(|name| directory.path().join(name));
            let size = (random.below(24 << 11) + 1) * 512;
            let what = format!("round {round}: {format} {how} {size}");
            println!("{what}");
            let image = Image::create(&path, &options(kind, size)).unwrap();
            assert!(image.size() >= size, "{what}");
            let model = fill(&image, &mut random);
            let mut found = vec![0xee; model.len()];
            image.read_at(at(0), &mut found).unwrap();
            assert!(found == model, "{what}: read while it is filled");
            // Dropping it does the same, but does not say whether it worked.
            if round % 2 == 0 {
                image.close().unwrap();
            } else {
                drop(image);
            }
            std::fs::write(&raw, &model).unwrap();
            run(
                "qemu-img",
                &["compare", "-f", "raw", "-F", format.name(), text(&raw), text(&path)],
            );
            check(&path, *format, &what);
            let image = Image::open(&path, &OpenOptions::new()).unwrap();
            assert_eq!((image.format(), image.size()), (*format, model.len() as u64), "{what}");
            found.fill(0xee);
            image.read_at(at(0), &mut found).unwrap();
            assert!(found == model, "{what}");
        }
    }
}

#[test]
fn threads_fill_an_image_at_once() {
    let directory = tempfile::tempdir().unwrap();
    for (number, kind) in KINDS.iter().enumerate() {
        let path = directory.path().join(format!("{number}.{}", kind.0));
        let image = Image::create(&path, &options(kind, 40 << 20)).unwrap();
        let size = image.size();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let image = &image;
                // Pieces of the same blocks; every third one is left out.
                scope.spawn(move || {
                    for piece in (thread..size >> 16).step_by(4).filter(|piece| piece % 3 > 0) {
                        let data = [piece as u8 | 1; 65536];
                        image.write_at(at(piece << 16), &data, Durability::Cached).unwrap();
                    }
                });
            }
        });
        image.close().unwrap();
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let mut found = vec![0; size as usize];
        image.read_at(at(0), &mut found).unwrap();
        for (piece, bytes) in found.chunks_exact(65536).enumerate() {
            let value = if piece % 3 > 0 { piece as u8 | 1 } else { 0 };
            assert!(bytes.iter().all(|byte| *byte == value), "{kind:?} {piece}");
        }
    }
}

/// The fields of a header that depend on the program or on the moment: offset and length.
fn own_fields(format: Format) -> &'static [(usize, usize)] {
    match format {
        // The text, and two identifiers.
        Format::Vdi => &[(0, 64), (392, 32)],
        // Time, identifier and the checksum, twice.
        Format::Vpc => &[(24, 4), (64, 20)],
        // The program, checksums, sequence numbers and identifiers; that the regions have to be
        // known, which QEMU does not say.
        Format::Vhdx => &[
            (8, 512),
            (0x10004, 44),
            (0x20004, 44),
            (0x30004, 4),
            (0x3002c, 4),
            (0x3004c, 4),
            (0x40004, 4),
            (0x4002c, 4),
            (0x4004c, 4),
        ],
        _ => &[],
    }
}

#[test]
fn headers_are_those_that_qemu_writes() {
    if !has_qemu_img() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for (format, how, set) in KINDS {
        for size in [512_u64, 100 << 20, (3 << 30) + 512, 150 << 30] {
            let what = format!("{format} {how} {size}");
            // Of fixed ones, QEMU says in the table that all blocks are zero.
            let [ours, theirs] = ["ours", "theirs"].map(|name| {
                let folder = directory.path().join(name);
                std::fs::create_dir_all(&folder).unwrap();
                folder.join("disk")
            });
            for path in [&ours, &theirs] {
                let _ = std::fs::remove_file(path);
            }
            Image::create(&ours, &options(&(*format, how, *set), size)).unwrap().close().unwrap();
            let size_text = size.to_string();
            let arguments =
                ["create", "-q", "-f", format.name(), "-o", how, text(&theirs), &size_text];
            run("qemu-img", &arguments);
            let json = |path: &Path| {
                let info = run("qemu-img", &["info", "--output=json", text(path)]);
                // Both are in folders of their own; what they take up on the disk may differ.
                let lines = info.lines().filter(|line| {
                    !line.contains("filename")
                        && !line.contains("actual-size")
                        && !line.contains("\"cid\"")
                });
                let lines = lines.map(str::to_owned);
                lines.collect::<Vec<_>>()
            };
            let (mut our_info, mut their_info) = (json(&ours), json(&theirs));
            if *format == Format::Vhdx {
                // QEMU leaves a gap before the blocks, or does not give fixed images their length.
                for info in [&mut our_info, &mut their_info] {
                    let first = info.iter().position(|line| line.contains("virtual-size"));
                    info.remove(first.unwrap());
                }
            }
            assert_eq!(our_info, their_info, "{what}");
            let start = |path: &Path| {
                let mut bytes = start_of(path, *format);
                for (offset, length) in own_fields(*format) {
                    if let Some(field) = bytes.get_mut(*offset..offset + length) {
                        field.fill(0);
                    }
                }
                bytes
            };
            if *format == Format::Vmdk {
                // The identifier has up to 8 digits.
                let without_id = |path: &Path| {
                    let bytes = start(path);
                    let text = String::from_utf8(bytes[512..21 * 512].to_vec()).unwrap();
                    let lines = text.trim_end_matches('\0').lines();
                    let lines: String = lines.filter(|line| !line.starts_with("CID=")).collect();
                    (lines, bytes[..512].to_vec(), bytes[21 * 512..].to_vec())
                };
                assert!(without_id(&ours) == without_id(&theirs), "{what}");
            } else {
                let (ours, theirs) = (start(&ours), start(&theirs));
                let place = ours.iter().zip(&theirs).position(|(one, other)| one != other);
                let at = place.unwrap_or(0);
                let near = |bytes: &[u8]| bytes[at..(at + 96).min(bytes.len())].to_vec();
                assert_eq!(near(&ours), near(&theirs), "{what}: at {at}");
                assert_eq!((place, ours.len()), (None, theirs.len()), "{what}");
            }
        }
    }
}

/// What comes before the blocks, or, of a fixed VHD, after them.
fn start_of(path: &Path, format: Format) -> Vec<u8> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let mut file = std::fs::File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let mut bytes = Vec::new();
    if format == Format::Vpc {
        file.seek(SeekFrom::Start(length - 512)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        return bytes;
    }
    // Of VHDX, the rest is not where QEMU has it.
    let wanted = if format == Format::Vhdx { 320 << 10 } else { 64 << 10 };
    file.take(wanted).read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn blocks_of_zeroes_take_no_space() {
    let directory = tempfile::tempdir().unwrap();
    for (number, kind) in KINDS.iter().enumerate() {
        let path = directory.path().join(format!("{number}.{}", kind.0));
        let image = Image::create(&path, &options(kind, 64 << 20)).unwrap();
        image.write_at(at(40 << 20), &[7; 4096], Durability::Cached).unwrap();
        image.close().unwrap();
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let extents = all_extents(&image, range(0, image.size()));
        let data: u64 = extents
            .iter()
            .filter(|extent| extent.kind == ExtentKind::Data)
            .map(|extent| extent.range.length())
            .sum();
        // VHDX has the largest blocks.
        assert!((4096..=8 << 20).contains(&data), "{kind:?}: {data}");
        let metadata = std::fs::metadata(&path).unwrap();
        let taken = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
        assert!(taken < 2 << 20, "{kind:?}: {taken}");
    }
}

#[test]
fn what_is_not_possible_is_refused_before_there_is_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let refused = |format: Format, size: u64, set: &dyn Fn(&mut CreateOptions), why: &str| {
        let mut create = CreateOptions::new(format, size);
        set(&mut create);
        let error = Image::create(&path, &create).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(why), "{error}");
        assert!(!path.exists(), "{error}");
    };
    refused(Format::Vdi, (512 << 40) + 1, &|_| {}, "512 TiB");
    refused(Format::Vpc, (2040 << 30) + 1, &|_| {}, "2040 GiB");
    refused(Format::Vhdx, (64 << 40) + 1, &|_| {}, "64 TiB");
    refused(Format::Vmdk, (2 << 40) + 1, &|_| {}, "2 TiB");
    // The tables need space as well when the disk is full.
    refused(Format::Vmdk, VMDK_MAX + 1, &|_| {}, "2198754295808");
    refused(Format::Vmdk, 0, &|_| {}, "0 bytes");
    refused(Format::Vdi, u64::MAX, &|_| {}, "2^63");
    let block = |create: &mut CreateOptions| create.foreign.block_size = Some(3 << 20);
    refused(Format::Vhdx, 1 << 20, &block, "power of two");
    let log = |create: &mut CreateOptions| create.foreign.log_size = Some(1 << 32);
    refused(Format::Vhdx, 1 << 20, &log, "4 GiB");
    let full = |create: &mut CreateOptions| create.preallocation = Preallocation::Full;
    refused(Format::Vdi, 1 << 20, &full, "preallocation");
    let overlay = |create: &mut CreateOptions| create.backing = Some(("b".into(), Format::Raw));
    refused(Format::Vmdk, 1 << 20, &overlay, "backing file");
    let word = |create: &mut CreateOptions| {
        create.foreign.hardware_version = Some("4\"\nparentCID=0".into());
    };
    refused(Format::Vmdk, 1 << 20, &word, "letters");
}

#[test]
fn a_vmdk_is_made_whatever_its_name_and_versions_are() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a\"\nb.vmdk");
    let mut create = CreateOptions::new(Format::Vmdk, 1 << 20);
    create.foreign.hardware_version = Some("vmx-13".into());
    Image::create(&path, &create).unwrap().close().unwrap();
    assert_eq!(Image::open(&path, &OpenOptions::new()).unwrap().size(), 1 << 20);
    assert!(std::fs::read(&path).unwrap().windows(6).any(|found| found == b"vmx-13"));
}

#[test]
fn a_new_image_is_complete_before_it_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::Vdi, Format::Vpc, Format::Vhdx, Format::Vmdk] {
        let path = directory.path().join(format.name());
        let create = CreateOptions::new(format, 8 << 20);
        let image = Image::create(&path, &create).unwrap();
        // As after a loss of power.
        let copy = directory.path().join("copy");
        std::fs::copy(&path, &copy).unwrap();
        let found = Image::open(&copy, &OpenOptions::new()).unwrap();
        assert_eq!((found.format(), found.size()), (format, image.size()));
        image.close().unwrap();
    }
}

#[test]
fn making_a_large_table_can_be_given_up() {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vdi");
    let mut create = CreateOptions::new(Format::Vdi, 8 << 40);
    // Each MiB of the table asks.
    create.give_up = || ASKED.fetch_add(1, Ordering::Relaxed) == 2;
    let error = Image::create(&path, &create).unwrap_err();
    assert!(error.to_string().contains("given up"), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_complete_image_is_not_opened_for_writing_nor_replaced() {
    let directory = tempfile::tempdir().unwrap();
    for (number, kind) in KINDS.iter().enumerate() {
        let path = directory.path().join(format!("{number}.{}", kind.0));
        Image::create(&path, &options(kind, 1 << 20)).unwrap().close().unwrap();
        let before = std::fs::read(&path).unwrap();
        let write = OpenOptions::new().access(Access::ReadWrite);
        assert_eq!(Image::open(&path, &write).unwrap_err().kind(), ErrorKind::ReadOnly);
        let error = Image::create(&path, &options(kind, 1 << 20)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        assert!(std::fs::read(&path).unwrap() == before);
    }
}

#[test]
fn large_disks_are_filled_from_one_end_to_the_other() {
    let directory = tempfile::tempdir().unwrap();
    for (format, size) in [
        (Format::Vdi, 4 << 40),
        (Format::Vpc, 2040 << 30),
        (Format::Vhdx, 64 << 40),
        (Format::Vmdk, VMDK_MAX),
    ] {
        let path = directory.path().join(format.name());
        let image = Image::create(&path, &options(&(format, "", |_| {}), size)).unwrap();
        // Pages of the table come and go.
        let places = (0..200).map(|part| size / 200 * part / 4096 * 4096).chain([size - 4096]);
        for place in places.clone() {
            image
                .write_at(at(place), &[(place >> 12) as u8 | 1; 4096], Durability::Cached)
                .unwrap();
        }
        image.close().unwrap();
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        assert_eq!(image.size(), size);
        for place in places {
            let mut found = [0; 4096];
            image.read_at(at(place), &mut found).unwrap();
            assert!(found == [(place >> 12) as u8 | 1; 4096], "{format} {place}");
        }
        drop(image);
        if has_qemu_img() {
            check(&path, format, format.name());
        }
    }
}

/// A new image of compressed grains.
fn stream(size: u64) -> CreateOptions {
    let mut create = CreateOptions::new(Format::Vmdk, size);
    create.open.cache = CacheMode::Unsafe;
    create.foreign.subformat = Subformat::StreamOptimized;
    create
}

#[test]
fn compressed_grains_are_read_by_qemu_and_come_in_the_order_of_the_disk() {
    if !has_qemu_img() {
        return;
    }
    let mut random = Random::new("compressed");
    let directory = tempfile::tempdir().unwrap();
    let [path, raw, grown] = ["disk", "raw", "grown"].map(|name| directory.path().join(name));
    for (round, size) in [(0, 512), (1, (9 << 20) + 512), (2, 70 << 20), (3, 97 << 20)] {
        let what = format!("{round}: {size}");
        // Whole tables of nothing, random and repeated bytes.
        let mut model = vec![0; size as usize];
        for _ in 0..random.below(40) {
            let offset = random.below(size);
            let length = random.below(300_000).min(size - offset) as usize;
            let part = &mut model[offset as usize..][..length];
            match random.below(2) {
                0 => part.copy_from_slice(&random.bytes(length)),
                _ => part.fill(7),
            }
        }
        std::fs::write(&raw, &model).unwrap();
        let source = Image::open(&raw, &OpenOptions::new().format(Format::Raw)).unwrap();
        for path in [&path, &grown] {
            let _ = std::fs::remove_file(path);
        }
        let image = Image::create(&path, &stream(size)).unwrap();
        let mut options = ConvertOptions::default();
        options.threads = std::num::NonZeroUsize::new(5).unwrap();
        options.background = Background::Zero;
        convert(&source, &image, &options, &JobContext::default()).unwrap();
        image.close().unwrap();
        run("qemu-img", &["compare", "-f", "raw", "-F", "vmdk", text(&raw), text(&path)]);
        check(&path, Format::Vmdk, &what);
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let mut found = vec![0xee; model.len()];
        image.read_at(at(0), &mut found).unwrap();
        assert!(found == model, "{what}");
        // The file is the same if one thread writes it, but for the identifier.
        let image = Image::create(&grown, &stream(size)).unwrap();
        image.write_at(at(0), &model, Durability::Cached).unwrap();
        image.close().unwrap();
        let [one, other] =
            [&path, &grown].map(|path| std::fs::read(path).unwrap()[65536..].to_vec());
        assert!(one == other, "{what}");
    }
}

#[test]
fn an_empty_image_of_compressed_grains_can_be_written_by_qemu() {
    if !common::has_tool("qemu-img") || !common::has_tool("qemu-io") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    // One table, and more tables than a sector of the directory names.
    for size in [1 << 20, 5 << 30] {
        let _ = std::fs::remove_file(&path);
        Image::create(&path, &stream(size)).unwrap().close().unwrap();
        check(&path, Format::Vmdk, "empty");
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let mut found = vec![0xee; 1 << 20];
        image.read_at(at(size - found.len() as u64), &mut found).unwrap();
        assert!(found.iter().all(|byte| *byte == 0));
        drop(image);
        let places = [0, size - 65536];
        for place in places {
            run("qemu-io", &["-f", "vmdk", "-c", &format!("write -P 7 {place} 64k"), text(&path)]);
        }
        check(&path, Format::Vmdk, "written");
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        for place in places {
            image.read_at(at(place), &mut found[..65536]).unwrap();
            assert!(found[..65536].iter().all(|byte| *byte == 7), "{size} {place}");
        }
    }
}

#[test]
fn compressed_grains_cannot_be_written_twice_or_in_part() {
    let directory = tempfile::tempdir().unwrap();
    let image = Image::create(directory.path().join("disk"), &stream(1 << 20)).unwrap();
    image.write_at(at(65536), &[7; 65536], Durability::Cached).unwrap();
    for (offset, length) in [(65536, 65536), (0, 65536), (1 << 17, 512), (131_584, 65536)] {
        let error = image.write_at(at(offset), &vec![7; length], Durability::Cached).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
    let mode = ZeroMode::MayUnmap;
    assert!(image.write_zeroes(range(0, 512), mode, Speed::Any, Durability::Cached).is_err());
    image.write_zeroes(range(1 << 17, 512), mode, Speed::Any, Durability::Cached).unwrap();
    assert!(image.read_at(at(0), &mut [0; 512]).is_err());
    image.close().unwrap();
}

/// A source that cannot be read from some place on.
struct Broken;

impl SourceReader for Broken {
    fn read(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<Content, String> {
        buffer.fill(7);
        if offset.bytes() < 40 << 20 { Ok(Content::Data) } else { Err("broken".to_owned()) }
    }
}

#[test]
fn a_conversion_in_order_ends_when_its_source_or_destination_fails() {
    let directory = tempfile::tempdir().unwrap();
    let size = 64 << 20;
    let raw = OpenOptions::new().format(Format::Raw);
    let whole = || {
        let bytes = Arc::new(MemoryStorage::from_bytes(&vec![7; size as usize]));
        Image::from_storage(bytes, &raw).unwrap()
    };
    let image = Image::create(directory.path().join("disk"), &stream(size)).unwrap();
    let mut options = ConvertOptions::default();
    options.threads = std::num::NonZeroUsize::new(4).unwrap();
    options.background = Background::Zero;
    options.reader = Some(Arc::new(Broken));
    let error = convert(&whole(), &image, &options, &JobContext::default()).unwrap_err();
    assert_eq!(error.to_string(), "broken");
    options.reader = None;
    // Its beginning was written already.
    let error = convert(&whole(), &image, &options, &JobContext::default()).unwrap_err();
    assert!(error.to_string().contains("each once"), "{error}");
    let cancelled = JobContext::default();
    cancelled.cancellation.cancel("enough");
    assert!(convert(&whole(), &image, &options, &cancelled).is_err());
}
