//! New VHDX images, with an empty log.
//!
//! The log is at 1 MiB, followed by the table of blocks, the metadata and the blocks.

use super::header::{BAT, ENTRY, HEADER_LENGTH, HEADERS, METADATA, MIB, TABLE_LENGTH, TABLES};
use super::metadata::{
    DISK_ID, DISK_SIZE, FILE_PARAMETERS, LOGICAL_SECTOR, PHYSICAL_SECTOR, SIZE_MAX,
};
use super::{CHUNK_SECTORS, SIGNATURE, crc32c, state};
use crate::create_options::invalid;
use crate::error::Result;
use crate::formats::block_table::{Numbers, TableShape};
use crate::formats::new::{InOrder, NewForeign, OTHER_FORMATS, Planned, random, too_large};
use crate::formats::new_blocks::{NewBlocks, NewImage, Shape};

const SECTOR: u64 = 512;

/// Where the log is, and its usual length.
const LOG: u64 = MIB;
const LOG_LENGTH: u64 = MIB;

/// Flags of items of metadata: of the virtual disk, and must be known.
const OF_DISK: u32 = 2;
const REQUIRED: u32 = 4;

#[derive(Debug)]
struct Vhdx {
    chunk_ratio: u64,
    data: u64,
    block_size: u64,
    /// Of blocks that are not stored.
    free: u64,
}

impl NewBlocks for Vhdx {
    fn index(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    fn block(&self, index: u64) -> Option<u64> {
        // The entries between are for bitmaps, which there are none of.
        let (chunk, place) = (index / (self.chunk_ratio + 1), index % (self.chunk_ratio + 1));
        (place != self.chunk_ratio).then_some(chunk * self.chunk_ratio + place)
    }

    fn free(&self, index: u64) -> u64 {
        self.block(index).map_or(0, |_| self.free)
    }

    fn stored(&self, _: u64, offset: u64) -> u64 {
        // In MiB from bit 20 on, which is the same as in bytes.
        offset | state::FULLY_PRESENT
    }

    fn number(&self, entry: u64) -> Option<u64> {
        let offset = (entry & 7 == state::FULLY_PRESENT).then_some(entry / MIB * MIB)?;
        Some(offset.checked_sub(self.data)? / self.block_size)
    }
}

pub(in crate::formats) fn plan(new: &NewForeign<'_>) -> Result<Planned> {
    let size = new.size_in(SECTOR)?;
    if size > SIZE_MAX {
        return Err(too_large(size, "VHDX", "64 TiB"));
    }
    let block_size = block_size(new.options.block_size, size)?;
    let log_length = log_length(new.options.log_size)?;
    let is_fixed = new.is_fixed("VHDX")?;
    let chunk_ratio = CHUNK_SECTORS * SECTOR / block_size;
    let blocks = size.div_ceil(block_size);
    let entries = blocks + blocks.saturating_sub(1) / chunk_ratio;
    let bat = LOG + log_length;
    let bat_length = (entries * 8).next_multiple_of(MIB).max(MIB);
    let metadata = bat + bat_length;
    let data = metadata + MIB;
    let mut parts = vec![(0, identifier()), (metadata, metadata_table())];
    parts.push((metadata + TABLE_LENGTH, items(size, block_size, is_fixed)?));
    let (written, changed) = (random()?, random()?);
    for (sequence, place) in (1..).zip(HEADERS) {
        parts.push((place, header(sequence, (written, changed), log_length)));
    }
    for place in TABLES {
        parts.push((place, regions((bat, bat_length), metadata)));
    }
    let table = TableShape { place: bat, copy: None, entries, numbers: Numbers::Little64 };
    let shape = Shape {
        size,
        block_size,
        before: Vec::new(),
        data,
        blocks_max: blocks,
        table: Some(table),
        is_fixed,
        parts,
        start: 0,
        backing: None,
    };
    let free = if new.options.absent_blocks { state::NOT_PRESENT } else { state::ZERO };
    Ok(NewImage::plan(
        Vhdx { chunk_ratio, data, block_size, free },
        shape,
        0,
        InOrder::No(OTHER_FORMATS),
    ))
}

/// The size of blocks, by that of the disk if none is given.
fn block_size(given: Option<u64>, size: u64) -> Result<u64> {
    match given {
        Some(given) if given.is_power_of_two() && (MIB..=256 * MIB).contains(&given) => Ok(given),
        Some(given) => Err(invalid(format!(
            "blocks of {given} bytes are not possible; choose a power of two from 1 MiB to 256 MiB"
        ))),
        // As QEMU has it.
        None if size > 32 << 40 => Ok(64 * MIB),
        None if size > 100 << 30 => Ok(32 * MIB),
        None if size > 1 << 30 => Ok(16 * MIB),
        None => Ok(8 * MIB),
    }
}

fn log_length(given: Option<u64>) -> Result<u64> {
    match given.unwrap_or(LOG_LENGTH) {
        length if length.is_multiple_of(MIB) && (MIB..1 << 32).contains(&length) => Ok(length),
        length => Err(invalid(format!(
            "a log of {length} bytes is not possible; choose whole MiB, and less than 4 GiB"
        ))),
    }
}

/// The first structure (MS-VHDX, section 2.2.1): the signature, and the program.
fn identifier() -> Vec<u8> {
    let creator = concat!("imgfmt ", env!("CARGO_PKG_VERSION"));
    let text = creator.encode_utf16().flat_map(u16::to_le_bytes);
    SIGNATURE.iter().copied().chain(text).collect()
}

fn header(sequence: u64, (written, changed): ([u8; 16], [u8; 16]), log_length: u64) -> Vec<u8> {
    let mut header = vec![0; HEADER_LENGTH as usize];
    header[..4].copy_from_slice(b"head");
    header[8..16].copy_from_slice(&sequence.to_le_bytes());
    header[16..32].copy_from_slice(&written);
    header[32..48].copy_from_slice(&changed);
    // The log has no entries: its GUID is zero.
    header[66..68].copy_from_slice(&1_u16.to_le_bytes());
    header[68..72].copy_from_slice(&(log_length as u32).to_le_bytes());
    header[72..80].copy_from_slice(&LOG.to_le_bytes());
    crc32c::seal(&mut header);
    header
}

fn regions((bat, bat_length): (u64, u64), metadata: u64) -> Vec<u8> {
    let mut table = vec![0; TABLE_LENGTH as usize];
    table[..4].copy_from_slice(b"regi");
    table[8..12].copy_from_slice(&2_u32.to_le_bytes());
    let regions = [(BAT, bat, bat_length), (METADATA, metadata, MIB)];
    for (entry, (guid, offset, length)) in table[16..].chunks_exact_mut(ENTRY).zip(regions) {
        entry[..16].copy_from_slice(&guid);
        entry[16..24].copy_from_slice(&offset.to_le_bytes());
        entry[24..28].copy_from_slice(&(length as u32).to_le_bytes());
        entry[28..32].copy_from_slice(&1_u32.to_le_bytes());
    }
    crc32c::seal(&mut table);
    table
}

/// The table of metadata: where each item is behind it.
fn metadata_table() -> Vec<u8> {
    let items = [
        (FILE_PARAMETERS, 0, 8, REQUIRED),
        (DISK_SIZE, 8, 8, REQUIRED | OF_DISK),
        (DISK_ID, 16, 16, REQUIRED | OF_DISK),
        (LOGICAL_SECTOR, 32, 4, REQUIRED | OF_DISK),
        (PHYSICAL_SECTOR, 36, 4, REQUIRED | OF_DISK),
    ];
    let mut table = vec![0; ENTRY * (1 + items.len())];
    table[..8].copy_from_slice(b"metadata");
    table[10..12].copy_from_slice(&(items.len() as u16).to_le_bytes());
    for (entry, (guid, offset, length, flags)) in table[ENTRY..].chunks_exact_mut(ENTRY).zip(items)
    {
        entry[..16].copy_from_slice(&guid);
        entry[16..20].copy_from_slice(&(TABLE_LENGTH as u32 + offset).to_le_bytes());
        entry[20..24].copy_from_slice(&u32::to_le_bytes(length));
        entry[24..28].copy_from_slice(&flags.to_le_bytes());
    }
    table
}

fn items(size: u64, block_size: u64, is_fixed: bool) -> Result<Vec<u8>> {
    let mut items = Vec::new();
    items.extend((block_size as u32).to_le_bytes());
    items.extend(u32::from(is_fixed).to_le_bytes());
    items.extend(size.to_le_bytes());
    items.extend(random()?);
    items.extend((SECTOR as u32).to_le_bytes());
    items.extend((SECTOR as u32).to_le_bytes());
    Ok(items)
}
