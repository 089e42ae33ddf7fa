//! New VDI images.

use super::{FREE, SECTOR, SIGNATURE, VERSION};
use crate::error::Result;
use crate::formats::block_table::{Numbers, TableShape};
use crate::formats::new::{InOrder, NewForeign, OTHER_FORMATS, Planned, random, too_large};
use crate::formats::new_blocks::{NewBlocks, NewImage, Part, Shape};

const BLOCK_SIZE: u64 = 1 << 20;

/// Most blocks of a disk, as in QEMU.
const BLOCKS_MAX: u64 = 0x1fff_ffff;

/// Where the table of blocks is, right behind the header.
const TABLE: u64 = 512;

/// The header is 456 bytes long, of which 72 are before its length.
const HEADER_LENGTH: u32 = 384;

/// The number of blocks in the file, in the header.
const COUNT: u64 = 388;

/// How a VDI numbers its blocks.
#[derive(Debug)]
struct Vdi;

impl NewBlocks for Vdi {
    fn free(&self, _: u64) -> u64 {
        FREE.into()
    }

    fn stored(&self, number: u64, _: u64) -> u64 {
        number
    }

    fn number(&self, entry: u64) -> Option<u64> {
        (entry <= BLOCKS_MAX).then_some(entry)
    }

    fn ending(&self, count: u64, _: u64) -> Vec<Part> {
        vec![(COUNT, (count as u32).to_le_bytes().to_vec())]
    }
}

pub(in crate::formats) fn plan(new: &NewForeign<'_>) -> Result<Planned> {
    let size = new.size_in(SECTOR)?;
    let blocks = size.div_ceil(BLOCK_SIZE);
    if blocks > BLOCKS_MAX {
        return Err(too_large(size, "VDI", "512 TiB"));
    }
    let is_fixed = new.is_fixed("VDI")?;
    let data = TABLE + (blocks * 4).next_multiple_of(SECTOR);
    let mut header = vec![0; TABLE as usize];
    let text = b"<<< Virtual Disk Image, made by imgfmt >>>\n";
    header[..text.len()].copy_from_slice(text);
    header[64..68].copy_from_slice(&SIGNATURE);
    let numbers = [
        (68, VERSION),
        (72, HEADER_LENGTH),
        (76, if is_fixed { 2 } else { 1 }),
        (340, TABLE as u32),
        (344, data as u32),
        (360, SECTOR as u32),
        (376, BLOCK_SIZE as u32),
        (384, blocks as u32),
    ];
    for (offset, number) in numbers {
        header[offset..offset + 4].copy_from_slice(&number.to_le_bytes());
    }
    header[368..376].copy_from_slice(&size.to_le_bytes());
    // Of the image, and of its last change.
    for offset in [392, 408] {
        header[offset..offset + 16].copy_from_slice(&random()?);
    }
    let table =
        TableShape { place: TABLE, copy: None, entries: blocks, numbers: Numbers::Little32 };
    let shape = Shape {
        size,
        block_size: BLOCK_SIZE,
        before: Vec::new(),
        data,
        blocks_max: BLOCKS_MAX,
        table: Some(table),
        is_fixed,
        parts: vec![(0, header)],
        start: 0,
        backing: None,
    };
    Ok(NewImage::plan(Vdi, shape, 0, InOrder::No(OTHER_FORMATS)))
}
