//! Conversions do not read holes that lie in blocks of other programs' formats, and find the same
//! disk: what those blocks are to maps does not change.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use imgfmt::jobs::{Background, ConvertOptions, JobContext, convert};
use imgfmt::storage::{FileStorage, MemoryStorage, StorageExtent};
use imgfmt::{
    Access, CacheMode, Content, CreateOptions, Durability, ExtentKind, Format, Holes, HostOffset,
    Image, Locking, Lookup, OpenOptions, Storage, Subformat,
};

use crate::common::{Random, all_extents, at, has_tool, range, run, text};
use crate::judge::subjects::rounds;

/// A file, and what is read of it.
#[derive(Debug)]
struct Counted {
    file: FileStorage,
    reads: Mutex<Vec<(u64, u64)>>,
}

impl Storage for Counted {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.reads.lock().unwrap().push((offset.bytes(), buffer.len() as u64));
        self.file.read_at(offset, buffer)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        self.file.write_at(offset, data, durability)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        self.file.next_extent(offset, length)
    }

    fn is_known_data(&self, _: HostOffset, _: u64) -> bool {
        false
    }
}

fn opened(path: &Path, format: Format) -> (Arc<Counted>, Image) {
    let file = FileStorage::open(path, Access::ReadOnly, Locking::On).unwrap();
    let counted = Arc::new(Counted { file, reads: Mutex::default() });
    let options = OpenOptions::new().format(format);
    let image = Image::from_storage(Arc::clone(&counted) as _, &options).unwrap();
    (counted, image)
}

/// Converts to a raw disk in memory.
fn converted(source: &Image) -> Vec<u8> {
    let memory = Arc::new(MemoryStorage::new(source.size()));
    let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
    let destination = Image::from_storage(Arc::clone(&memory) as _, &options).unwrap();
    let mut options = ConvertOptions::default();
    options.background = Background::Zero;
    convert(source, &destination, &options, &JobContext::default()).unwrap();
    let mut bytes = vec![0xee; source.size() as usize];
    destination.read_at(at(0), &mut bytes).unwrap();
    bytes
}

/// Where the image has its data: from where to where on the file, in pieces.
fn data_of(image: &Image) -> Vec<(u64, u64)> {
    let mut pieces = Vec::new();
    let all = range(0, image.size());
    let _all = image
        .map(all, Holes::AsData, Lookup::MayRead, |mapping| {
            if let Content::File(file) = mapping.content {
                let start = file.offset.bytes();
                pieces.push((start, start + mapping.range.length()));
            }
            true
        })
        .unwrap();
    pieces
}

/// The holes of the file from a start to an end.
fn holes_of(file: &FileStorage, (start, end): (u64, u64)) -> Vec<(u64, u64)> {
    let (mut position, mut holes) = (start, Vec::new());
    while position < end {
        let found = file.next_extent(HostOffset::new(position), end - position).unwrap();
        if found.kind != ExtentKind::Data {
            holes.push((position, position + found.length));
        }
        position += found.length;
    }
    holes
}

#[test]
fn a_conversion_reads_no_hole_in_blocks_and_finds_the_same_disk() {
    let mut random = Random::new("holes in blocks");
    for round in 0..rounds("IMGFMT_FORMAT_ROUNDS", 2) {
        for (format, subformat) in [
            (Format::Vhdx, Subformat::Dynamic),
            (Format::Vhdx, Subformat::Fixed),
            (Format::Vdi, Subformat::Dynamic),
            (Format::Vpc, Subformat::Dynamic),
            (Format::Vpc, Subformat::Fixed),
            (Format::Vmdk, Subformat::Dynamic),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("disk");
            let mut create = CreateOptions::new(format, 33 << 20);
            create.open.cache = CacheMode::Unsafe;
            create.foreign.subformat = subformat;
            let image = Image::create(&path, &create).unwrap();
            let mut model = vec![0; image.size() as usize];
            for _ in 0..random.below(12) + 1 {
                let offset = random.below(model.len() as u64 / 4096) as usize * 4096;
                let length = (random.below(40) as usize + 1) * 4096;
                let end = (offset + length).min(model.len());
                model[offset..end].fill(random.next() as u8 | 1);
                image.write_at(at(offset as u64), &model[offset..end], Durability::Cached).unwrap();
            }
            image.close().unwrap();
            let what = format!("round {round}: {format} {subformat:?}");
            let (counted, image) = opened(&path, format);
            let data = data_of(&image);
            let holes: Vec<_> =
                data.iter().flat_map(|piece| holes_of(&counted.file, *piece)).collect();
            // Data need not begin in the file where a unit of 4 KiB does, of which all is read.
            let is_hole = |start: u64, end: u64| {
                holes.iter().any(|hole| start.max(hole.0) + 4096 <= end.min(hole.1))
            };
            counted.reads.lock().unwrap().clear();
            let bytes = converted(&image);
            assert!(bytes == model, "{what}");
            for (offset, length) in counted.reads.lock().unwrap().iter() {
                // The tables are elsewhere.
                assert!(!is_hole(*offset, offset + length), "{what}: {length} at {offset}");
            }
            // Blocks of VHDX have 8 MiB, and parts of 164 KiB at most were written.
            assert!(format != Format::Vhdx || !holes.is_empty(), "{what}: no holes to be found");
            let shown = all_extents(&image, range(0, image.size()));
            let shown: u64 = shown
                .iter()
                .filter(|extent| extent.kind == ExtentKind::Data)
                .map(|extent| extent.range.length())
                .sum();
            if subformat == Subformat::Dynamic {
                let blocks: u64 = data.iter().map(|(start, end)| end - start).sum();
                assert_eq!(shown, blocks, "{what}: a map shows blocks as they are");
            }
        }
    }
}

#[test]
fn holes_in_blocks_of_images_that_qemu_made_are_zeroes() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let mut random = Random::new("holes of QEMU");
    for (format, option) in [
        ("vhdx", "block_size=8M"),
        ("vdi", "static=off"),
        ("vpc", "subformat=dynamic"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=streamOptimized"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let [raw, path, again] = ["raw", "disk", "again"].map(|name| directory.path().join(name));
        run("qemu-img", &["create", "-q", "-f", "raw", text(&raw), "48M"]);
        for _ in 0..8 {
            let offset = random.below(47 << 20) / 512 * 512;
            let write =
                format!("write -P {} {offset} {}", random.below(255) + 1, 512 << (offset % 9));
            run("qemu-io", &["-f", "raw", "-c", &write, text(&raw)]);
        }
        let made = ["convert", "-f", "raw", "-O", format, "-o", option, text(&raw), text(&path)];
        run("qemu-img", &made);
        // Space that was given back inside blocks.
        let _ = std::process::Command::new("fallocate").args(["-d", text(&path)]).status();
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let bytes = converted(&image);
        std::fs::write(&again, bytes).unwrap();
        run("qemu-img", &["compare", "-f", "raw", "-F", format, text(&again), text(&path)]);
    }
}
