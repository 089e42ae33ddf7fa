//! Images of other programs' formats, which are only read: the bytes are those of the file.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::{BackingFile, Format, Image, OpenOptions, OpenPolicy};

use super::{foreign_vmdk, look};

/// Longer files are not looked at.
const LENGTH_MAX: usize = 1 << 20;

pub(super) fn foreign(format: Format, data: &[u8]) {
    if data.len() > LENGTH_MAX {
        return;
    }
    let storage = Arc::new(MemoryStorage::from_bytes(data));
    let options =
        OpenOptions::new().format(format).policy(OpenPolicy::deny()).backing(BackingFile::Ignored);
    match Image::from_storage(Arc::clone(&storage) as _, &options) {
        Ok(image) => look(&image),
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
    let _ = Image::inspect_storage(storage, &options);
}

/// An image of VirtualBox.
pub(crate) fn vdi(data: &[u8]) {
    foreign(Format::Vdi, data);
}

/// The seeds of the targets: sound images.
pub(crate) fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let mut seeds = vec![
        ("vdi", "dynamic", vdi_image(1, 10 * 4096 - 512, &[u32::MAX, 0, 2, 1, u32::MAX - 1, 3])),
        ("vdi", "fixed", vdi_image(2, 4 * 4096, &[0, 1, 2, 3])),
    ];
    seeds.extend(foreign_vmdk::seeds());
    seeds
}

/// An image with blocks of 4 KiB: its type, the size of the disk, and the start of its table. The
/// first byte of a block is its number in the file, plus one.
pub(crate) fn vdi_image(kind: u32, size: u64, table: &[u32]) -> Vec<u8> {
    const BLOCK: usize = 4096;
    let blocks = size.div_ceil(BLOCK as u64) as usize;
    let stored = table.iter().filter(|entry| **entry < u32::MAX - 1).count();
    let mut image = vec![0; 1024 + stored * BLOCK];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"<<< a disk >>>\n");
    for (offset, field) in [
        (64, 0xbeda_107f),
        (68, 0x0001_0001),
        (72, 400),
        (76, kind),
        (340, 512),
        (344, 1024),
        (360, 512),
        (376, BLOCK as u32),
        (384, blocks as u32),
        (388, stored as u32),
    ] {
        put(offset, &u32::to_le_bytes(field));
    }
    put(368, &size.to_le_bytes());
    for block in 0..blocks {
        let entry = table.get(block).copied().unwrap_or(u32::MAX);
        put(512 + block * 4, &entry.to_le_bytes());
    }
    for block in 0..stored {
        put(1024 + block * BLOCK, &[block as u8 + 1]);
    }
    image
}
