//! What the fuzz targets do with their bytes. Shared with `tests/it/fuzz_corpus.rs`, which replays
//! the corpus on every run of the tests.
//!
//! A body panics when something is wrong; it says nothing otherwise.

#[path = "archives.rs"]
pub(crate) mod archives;
#[path = "bitmaps.rs"]
pub(crate) mod bitmaps;
#[path = "damaged.rs"]
pub(crate) mod damaged;
#[path = "foreign.rs"]
pub(crate) mod foreign;
#[path = "foreign_images.rs"]
pub(crate) mod foreign_images;
#[path = "foreign_vhdx.rs"]
pub(crate) mod foreign_vhdx;
#[path = "foreign_vmdk.rs"]
pub(crate) mod foreign_vmdk;
#[path = "handmade.rs"]
pub(crate) mod handmade;
#[path = "luks.rs"]
pub(crate) mod luks;

use std::ops::Range;
use std::sync::Arc;

use handmade::Handmade;
use imgfmt::storage::MemoryStorage;
use imgfmt::{
    Access, Content, Durability, FileSpan, Format, GuestOffset, GuestRange, HostOffset, Image,
    Mapping, OpenOptions, OpenPolicy, Speed, Storage, ZeroMode,
};

/// A name of a target with its body.
type Target = (&'static str, fn(&[u8]));

/// All of them.
pub(crate) const TARGETS: [Target; 18] = [
    ("header", header),
    ("l2_walk", l2_walk),
    ("refcounts", refcounts),
    ("decompress", decompress),
    ("operations", operations),
    ("bitmaps", bitmaps::bitmaps),
    ("sidecar", bitmaps::sidecar),
    ("damaged", damaged::damaged),
    ("vdi", foreign::vdi),
    ("vmdk", foreign_vmdk::vmdk),
    ("vhdx", foreign_vhdx::vhdx),
    ("vpc", foreign::vpc),
    ("qed", foreign::qed),
    ("qcow", foreign::qcow),
    ("parallels", foreign::parallels),
    ("luks2", luks::luks2),
    ("tar", archives::tar),
    ("ovf", archives::ovf),
];

/// No more of a disk than this is looked at.
const LOOK_MAX: u64 = 1 << 20;

fn open(bytes: &[u8], access: Access) -> (Arc<MemoryStorage>, imgfmt::Result<Image>) {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let options = OpenOptions::new()
        .format(Format::Qcow2)
        .access(access)
        .policy(OpenPolicy::deny())
        .metadata_cache_bytes(0);
    let image = Image::from_storage(Arc::clone(&storage) as _, &options);
    (storage, image)
}

fn content(storage: &MemoryStorage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().expect("memory has a length") as usize];
    storage.read_exact_at(HostOffset::new(0), &mut bytes).expect("memory can be read");
    bytes
}

fn range(offset: u64, length: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(offset), length).expect("a small range")
}

/// Looks at the start and the end of a disk in every way; all must tell the same.
fn look(image: &Image) {
    let size = image.size();
    let length = size.min(LOOK_MAX);
    for offset in [0, (size - length) & !511] {
        let place = range(offset, length);
        let mut bytes = vec![0; length as usize];
        let read = image.read_at(place.offset(), &mut bytes);
        let _ = image.try_read_at(place.offset(), &mut vec![0; length as usize]);
        let extents = image.extents(place).bounded(1, 64).collect::<imgfmt::Result<Vec<_>>>();
        if let Ok(extents) = extents {
            let mut position = offset;
            for extent in extents {
                assert_eq!(extent.range.offset().bytes(), position, "a gap between extents");
                assert!(!extent.range.is_empty(), "an empty extent");
                position = extent.range.end().bytes();
            }
            assert!(position <= place.end().bytes(), "extents beyond the range");
        }
        if let (Ok(map), Ok(())) = (image.map_read(place), read) {
            for mapping in map.mappings() {
                check_mapping(mapping, offset, &bytes);
            }
        }
    }
}

fn check_mapping(mapping: Mapping<'_>, base: u64, expected: &[u8]) {
    let place = mapping.range;
    let start = (place.offset().bytes() - base) as usize;
    let expected = &expected[start..start + place.length() as usize];
    match mapping.content {
        Content::File(FileSpan { storage, offset, .. }) => {
            let mut found = vec![0; expected.len()];
            storage.read_exact_at(offset, &mut found).expect("what is mapped can be read");
            assert!(found == expected, "{place} differ when read by their mapping");
        }
        Content::Hole | Content::Zero => {
            assert!(expected.iter().all(|byte| *byte == 0), "{place} are mapped as zero");
        }
        _ => {}
    }
}

/// The first 512 bytes are the header of an image whose tables are sound.
pub(crate) fn header(data: &[u8]) {
    let mut image = Handmade::new(9, 1 << 15);
    image.add_data(0, 7);
    let mut bytes = image.bytes;
    let length = data.len().min(512);
    bytes[..length].copy_from_slice(&data[..length]);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let (storage, opened) = open(&bytes, access);
        match opened {
            Ok(image) => look(&image),
            Err(error) => {
                assert!(!error.to_string().contains(char::is_control), "{error:?}");
                // One that was not closed is repaired as far as possible before it is refused.
                let is_dirty = bytes[handmade::field::INCOMPATIBLE + 7] & 1 != 0;
                let is_same = content(&storage) == bytes;
                assert!(is_same || is_dirty, "changed, then refused: {error}");
            }
        }
    }
}

/// The first byte chooses the kind of image; the others are its L1 and L2 entries.
pub(crate) fn l2_walk(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let mut image = match choice % 3 {
        0 => Handmade::new(9, 1 << 15),
        1 => Handmade::new(12, 1 << 20),
        _ => Handmade::new(14, 1 << 20).extended(),
    };
    image.add_data(0, 7);
    image.add_data(1, 9);
    if choice & 0x80 != 0 {
        image.put32(handmade::field::VERSION, 2);
        image.bytes[72..112].fill(0);
    }
    let cluster = image.cluster();
    let (l1, l2) = data.split_at(if choice & 0x40 != 0 { data.len().min(8) } else { 0 });
    image.bytes[3 * cluster..3 * cluster + l1.len()].copy_from_slice(l1);
    let length = l2.len().min(cluster);
    image.bytes[4 * cluster..4 * cluster + length].copy_from_slice(&l2[..length]);
    let (storage, opened) = open(&image.bytes, Access::ReadOnly);
    if let Ok(disk) = opened {
        look(&disk);
    }
    assert!(content(&storage) == image.bytes, "reading changed the image");
}

/// The first 32 bytes are the start of the refcount table, the others of its first block; then the
/// image is written.
pub(crate) fn refcounts(data: &[u8]) {
    let mut image = Handmade::new(9, 1 << 15);
    image.add_data(0, 7);
    let cluster = image.cluster();
    let (table, block) = data.split_at(data.len().min(32));
    image.bytes[cluster..cluster + table.len()].copy_from_slice(table);
    let length = block.len().min(cluster);
    image.bytes[2 * cluster..2 * cluster + length].copy_from_slice(&block[..length]);
    let (storage, opened) = open(&image.bytes, Access::ReadWrite);
    let Ok(disk) = opened else { return };
    for number in 1..64 {
        let _ = disk.write_at(GuestOffset::new(number * 512), &[1; 512], Durability::Cached);
    }
    let _ = disk.discard(range(0, 4096), Durability::Cached);
    let _ = disk.flush();
    drop(disk);
    let length = storage.len().expect("memory has a length");
    assert!(length < 1 << 26, "the file has become {length} bytes long");
}

/// The bytes are a compressed cluster, of both kinds of compression.
pub(crate) fn decompress(data: &[u8]) {
    for compression in 0..2 {
        let mut image = Handmade::new(12, 1 << 16);
        image.add_data(0, 7);
        if compression == 1 {
            image.put64(handmade::field::INCOMPATIBLE, 1 << 3);
            image.bytes[handmade::field::COMPRESSION_TYPE] = 1;
        }
        image.add_compressed(1, data);
        let (_, opened) = open(&image.bytes, Access::ReadOnly);
        look(&opened.expect("a sound image"));
    }
}

/// The first byte chooses the kind of image; then five bytes are an operation, which is done to the
/// image and to a row of bytes.
pub(crate) fn operations(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let size = 40 * 4096 + 512;
    let image = match choice % 3 {
        0 => Handmade::new(10, 100 * 1024),
        1 => Handmade::new(12, size),
        _ => Handmade::new(14, size).extended(),
    };
    let (storage, opened) = open(&image.bytes, Access::ReadWrite);
    let mut disk = opened.expect("a sound image");
    let mut model = vec![0; disk.size() as usize];
    for operation in data.chunks_exact(5).take(200) {
        if operation[0] % 16 == 15 {
            disk.close().expect("memory does not fail");
            disk = open(&content(&storage), Access::ReadWrite).1.expect("a sound image");
            // From now on the copy is written.
            return check_and_continue(disk, model, data);
        }
        operate(&disk, &mut model, operation);
    }
    check(&disk, &model);
}

/// After reopening only the content is compared, and the operations are done once more.
fn check_and_continue(disk: Image, mut model: Vec<u8>, data: &[u8]) {
    check(&disk, &model);
    for operation in data.chunks_exact(5).take(100) {
        operate(&disk, &mut model, operation);
    }
    check(&disk, &model);
}

fn check(disk: &Image, model: &[u8]) {
    let mut found = vec![0xee; model.len()];
    disk.read_at(GuestOffset::new(0), &mut found).expect("memory does not fail");
    assert!(found == model, "the disk differs from the model");
}

fn operate(disk: &Image, model: &mut [u8], operation: &[u8]) {
    let (_, done) = try_to_operate(disk, model, operation);
    done.expect("memory does not fail");
}

/// Says also which part of the disk is concerned.
fn try_to_operate(
    disk: &Image,
    model: &mut [u8],
    operation: &[u8],
) -> (Range<usize>, imgfmt::Result<()>) {
    let size = model.len() as u64;
    let word = |at: usize| u64::from(u16::from_be_bytes([operation[at], operation[at + 1]]));
    // Odd places are as likely as aligned ones.
    let unit = if operation[0] & 0x40 != 0 { 512 } else { 1 };
    let offset = (word(1) * 5 * unit) % size;
    let length = ((word(3) * unit) % 70_000).min(size - offset);
    let place = range(offset, length);
    let part = offset as usize..(offset + length) as usize;
    let cached = Durability::Cached;
    let done = match operation[0] % 16 {
        0..=5 => {
            let data = vec![operation[4] | 1; length as usize];
            model[part.clone()].fill(operation[4] | 1);
            disk.write_at(place.offset(), &data, cached)
        }
        6..=8 => {
            let keep = [ZeroMode::MayUnmap, ZeroMode::KeepAllocated];
            let mode = keep[usize::from(operation[0] & 0x80 != 0)];
            model[part.clone()].fill(0);
            disk.write_zeroes(place, mode, Speed::Any, cached)
        }
        9..=11 => disk.discard(place, cached).and_then(|()| {
            let mut found = vec![0; length as usize];
            disk.read_at(place.offset(), &mut found)?;
            for (new, old) in found.iter().zip(&mut model[part.clone()]) {
                assert!(*new == 0 || new == old, "a discard shows foreign data");
                *old = *new;
            }
            Ok(())
        }),
        12 => disk.flush(),
        _ => {
            check(disk, model);
            Ok(())
        }
    };
    (part, done)
}
