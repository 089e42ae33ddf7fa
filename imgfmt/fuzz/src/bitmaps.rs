//! The targets for dirty bitmaps: what the image says of them, and the sidecar.

use std::sync::Arc;

use imgfmt::testing::{RecordedDirectory, Recorder};
use imgfmt::{
    Access, BitmapChange, BitmapState, Durability, Format, GuestOffset, Image, OpenOptions, Storage,
};

use super::handmade::{Handmade, field};
use super::{content, open, range};

const BITMAPS: u32 = 0x2385_2875;
const SIDECAR: u32 = 0x6469_7274;
const BOOT: &str = "11111111-aaaa-bbbb-cccc-dddddddddddd";
const OTHER_BOOT: &str = "22222222-aaaa-bbbb-cccc-dddddddddddd";

/// The clusters of 512 bytes behind that of data: directory, table, and the bits.
const DIRECTORY: usize = 6;
const TABLE: usize = 7;
const BITS: usize = 8;
const CLUSTERS: usize = 10;
const SIZE: u64 = 1 << 15;

/// Where things are in the sidecar.
const LOG: usize = 4096;
const DESCRIPTORS: usize = 12_288;
const WORDS: usize = 16_384;
const LENGTH: usize = 20_480;

/// A directory of one bitmap of 512 bytes per bit, named `b`, whose bits are in a cluster of their
/// own.
pub(crate) fn entry(flags: u32) -> Vec<u8> {
    let mut entry = Vec::new();
    entry.extend((TABLE as u64 * 512).to_be_bytes());
    entry.extend(1u32.to_be_bytes());
    entry.extend(flags.to_be_bytes());
    entry.extend([1, 9, 0, 1, 0, 0, 0, 0, b'b', 0, 0, 0, 0, 0, 0, 0]);
    entry
}

fn with_directory(
    count: u32,
    length: usize,
    directory: &[u8],
    table: &[u8],
    bits: &[u8],
) -> Handmade {
    let mut image = Handmade::new(9, SIZE);
    image.add_data(0, 7);
    image.bytes.resize(CLUSTERS * 512, 0);
    (DIRECTORY..CLUSTERS).for_each(|cluster| image.set_refcount(cluster, 1));
    image.put64(field::AUTOCLEAR, 1);
    image.put32(field::EXTENSIONS, BITMAPS);
    image.put32(field::EXTENSIONS + 4, 24);
    image.put32(field::EXTENSIONS + 8, count);
    image.put64(field::EXTENSIONS + 16, length as u64);
    image.put64(field::EXTENSIONS + 24, DIRECTORY as u64 * 512);
    for (cluster, content) in [(DIRECTORY, directory), (TABLE, table), (BITS, bits)] {
        let length = content.len().min(512);
        image.bytes[cluster * 512..][..length].copy_from_slice(&content[..length]);
    }
    image
}

/// The first byte is the number of bitmaps, the second the directory's length in words of 8 bytes;
/// then the directory, 64 bytes of a table, and bits. Whatever they say, the disk can be used.
pub(crate) fn bitmaps(data: &[u8]) {
    let [count, words, rest @ ..] = data else { return };
    let length = usize::from(*words) * 8;
    let (directory, rest) = rest.split_at(rest.len().min(length));
    let (table, bits) = rest.split_at(rest.len().min(64));
    let image = with_directory(u32::from(*count), length, directory, table, bits);
    let (storage, opened) = open(&image.bytes, Access::ReadOnly);
    use_disk(opened.expect("the disk is sound"), Access::ReadOnly);
    assert!(content(&storage) == image.bytes, "reading changed the image");
    let (storage, opened) = open(&image.bytes, Access::ReadWrite);
    use_disk(opened.expect("the disk is sound"), Access::ReadWrite);
    let length = storage.len().expect("memory has a length");
    assert!(length < 1 << 20, "the file has become {length} bytes long");
    let (_, opened) = open(&content(&storage), Access::ReadOnly);
    let disk = opened.expect("the disk is still sound");
    assert!(first_bytes(&disk) == [8; 512], "what was written is lost");
    look_at_bitmaps(&disk);
}

fn first_bytes(disk: &Image) -> [u8; 512] {
    let mut found = [0; 512];
    disk.read_at(GuestOffset::new(0), &mut found).expect("memory does not fail");
    found
}

fn look_at_bitmaps(disk: &Image) {
    let _ = disk.bitmap_damage();
    for bitmap in disk.bitmaps() {
        let extents = disk.dirty_extents(&bitmap.name, range(0, SIZE), 16);
        if let (BitmapState::Consistent { dirty_bytes }, Ok(extents)) = (&bitmap.state, &extents) {
            assert!(*dirty_bytes <= SIZE, "{bitmap:?}");
            let mut position = 0;
            for extent in extents {
                assert_eq!(extent.range.offset().bytes(), position, "a gap between extents");
                assert!(!extent.range.is_empty(), "an empty extent");
                position = extent.range.end().bytes();
            }
            assert!(position <= SIZE, "extents past the end of the disk");
        }
        // Two of the same name may be of different states.
        let names = disk.bitmaps().into_iter().filter(|other| other.name == bitmap.name).count();
        let is_sound = matches!(bitmap.state, BitmapState::Consistent { .. });
        assert!(names > 1 || is_sound == extents.is_ok(), "{bitmap:?}: {extents:?}");
    }
}

/// Reads and, if that is possible, writes, and changes every bitmap in some way.
fn use_disk(disk: Image, access: Access) {
    assert_eq!(first_bytes(&disk), [7; 512]);
    look_at_bitmaps(&disk);
    if access == Access::ReadOnly {
        return;
    }
    let write = |offset, length| {
        let data = vec![8; length];
        disk.write_at(GuestOffset::new(offset), &data, Durability::Cached).expect("a sound disk");
    };
    write(0, 512);
    look_at_bitmaps(&disk);
    for (number, bitmap) in disk.bitmaps().into_iter().enumerate() {
        let name = bitmap.name;
        let _ = disk.bitmap_transaction(&[match number % 4 {
            0 => BitmapChange::Repair { name },
            1 => BitmapChange::Clear { name },
            2 => BitmapChange::Merge { from: name.clone(), into: name },
            _ => BitmapChange::Remove { name },
        }]);
    }
    write(4096, 5000);
    look_at_bitmaps(&disk);
    disk.close().expect("memory does not fail");
}

/// The first byte chooses which checksums are made right, the boot and the length; the others are
/// put over a sound sidecar with exclusive or: 140 bytes of header, 64 of a slot of the log, 32 of
/// a bitmap's descriptor, 16 of bits. Whatever they say, the disk can be used.
pub(crate) fn sidecar(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let found = damaged_sidecar(*choice, data);
    let mut image = with_directory(1, 32, &entry(3), &(BITS as u64 * 512).to_be_bytes(), &[1]);
    image.put64(field::AUTOCLEAR, 1 << 63 | 1);
    let extension = field::EXTENSIONS + 32;
    image.put32(extension, SIDECAR);
    image.put32(extension + 4, 24);
    image.put64(extension + 24, 1);
    let boot = if choice & 8 == 0 { BOOT } else { OTHER_BOOT };
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let recorder = Recorder::new();
        let storage = recorder.storage(&image.bytes);
        let directory = Arc::new(RecordedDirectory::new(&recorder, boot, Some(&found)));
        let options =
            OpenOptions::new().format(Format::Qcow2).access(access).sidecar_directory(&directory);
        let open = || Image::from_storage(Arc::clone(&storage) as _, &options);
        let disk = open().expect("the disk is sound");
        if [0, 8, 16].contains(choice) && data.iter().all(|byte| *byte == 0) {
            assert_eq!(disk.bitmap_durability().recovered, ["b"], "a sound one is believed");
        }
        use_disk(disk, access);
        match access {
            Access::ReadOnly => assert!(storage.content() == image.bytes, "reading changed it"),
            Access::ReadWrite => assert_eq!(first_bytes(&open().expect("still sound")), [8; 512]),
        }
    }
}

fn damaged_sidecar(choice: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = sound_sidecar(if choice & 16 == 0 { 2 } else { 1 });
    let places = [(0, 140), (LOG, 64), (DESCRIPTORS, 32), (WORDS, 16)];
    let mut rest = data;
    for (place, length) in places {
        let (part, behind) = rest.split_at(rest.len().min(length));
        bytes[place..].iter_mut().zip(part).for_each(|(byte, change)| *byte ^= change);
        rest = behind;
    }
    if choice & 1 == 0 {
        let count = u32::from_le_bytes([bytes[100], bytes[101], bytes[102], bytes[103]]) as usize;
        let end = count.saturating_mul(1056).saturating_add(DESCRIPTORS).min(LENGTH);
        let crc = crc32(&bytes[DESCRIPTORS..end]);
        bytes[132..136].copy_from_slice(&crc.to_le_bytes());
    }
    if choice & 2 == 0 {
        let crc = crc32(&bytes[..508]);
        bytes[508..512].copy_from_slice(&crc.to_le_bytes());
    }
    if choice & 4 == 0 {
        // That of the slot.
        let crc = crc32(&bytes[LOG + 4..LOG + 512]);
        bytes[LOG..LOG + 4].copy_from_slice(&crc.to_le_bytes());
    }
    if choice & 32 != 0 {
        bytes.truncate(data.first().map_or(0, |byte| usize::from(*byte) * 80));
    }
    bytes
}

/// A sidecar for the image with one bitmap, as the table in `DESIGN.md` has it; without checksums
/// of header, descriptors and the first slot.
fn sound_sidecar(level: u32) -> Vec<u8> {
    let mut bytes = vec![0; LENGTH];
    let mut put = |place: usize, field: &[u8]| {
        bytes[place..place + field.len()].copy_from_slice(field);
    };
    put(0, b"IMGDIRTY");
    put(8, &1u32.to_le_bytes());
    put(12, &level.to_le_bytes());
    put(32, &1u64.to_le_bytes());
    put(40, &1u64.to_le_bytes());
    put(48, &SIZE.to_le_bytes());
    put(56, &22u32.to_le_bytes());
    put(60, &10u32.to_le_bytes());
    put(64, BOOT.as_bytes());
    put(100, &1u32.to_le_bytes());
    // The first storage of a recording has this inode.
    put(104, &1u64.to_le_bytes());
    put(112, &(CLUSTERS as u64 * 512).to_le_bytes());
    let mut fixed = b"QFI\xfb\0\0\0\x03\0\0\0\x09\0\0\0\0".to_vec();
    fixed.extend([0, 0, 0, 4, 0, 0, 0, 112]);
    put(128, &crc32(&fixed).to_le_bytes());
    put(136, &(LENGTH as u64).to_le_bytes());
    // The first slot names one extent. Its checksum is made later.
    let mut slot = [0; 512];
    slot[16] = 1;
    let crc = crc32(&slot[4..]);
    slot[..4].copy_from_slice(&crc.to_le_bytes());
    (0..10).for_each(|number| put(LOG + number * 512, &slot));
    put(LOG + 4, &[1]);
    put(DESCRIPTORS, &9u32.to_le_bytes());
    put(DESCRIPTORS + 4, &1u32.to_le_bytes());
    put(DESCRIPTORS + 8, &(SIZE / 512).to_le_bytes());
    put(DESCRIPTORS + 16, b"b");
    put(WORDS, &0b1010u64.to_le_bytes());
    bytes
}

/// CRC-32 as in Ethernet.
fn crc32(bytes: &[u8]) -> u32 {
    let one = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    };
    !bytes.iter().fold(u32::MAX, one)
}
