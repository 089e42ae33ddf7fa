//! Where persistent bitmaps lie, so that a check does not take them for leaks.
//!
//! The bitmaps themselves are not read here.

use super::header::{Header, invalid, read_error, u16_at, u32_at, u64_at};
use super::open::read_words;
use crate::error::Result;
use crate::storage::Storage;
use crate::units::HostOffset;

const ENTRY_LENGTH: u64 = 24;
const BITMAPS_MAX: u32 = 65535;
const DIRECTORY_BYTES_MAX: u64 = 64 << 20;
const TABLE_ENTRIES_MAX: u32 = 1 << 24;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The places (offset and length) that the bitmaps of an image take up.
pub(super) fn places(storage: &dyn Storage, header: &Header) -> Result<Vec<(u64, u64)>> {
    let Some(extension) = &header.extensions.bitmaps else { return Ok(Vec::new()) };
    let count = u32_at(extension, 0);
    let (length, offset) = (u64_at(extension, 8), u64_at(extension, 16));
    let cluster = header.geometry.cluster_size();
    if extension.len() != 24 || count > BITMAPS_MAX || length > DIRECTORY_BYTES_MAX {
        return Err(invalid("its bitmap directory is damaged"));
    }
    let mut directory = vec![0; length as usize];
    storage.read_exact_at(HostOffset::new(offset), &mut directory).map_err(read_error)?;
    let mut places = vec![(offset, length)];
    let mut rest = &directory[..];
    for _ in 0..count {
        if (rest.len() as u64) < ENTRY_LENGTH {
            return Err(invalid("its bitmap directory is damaged"));
        }
        let (table_offset, table_entries) = (u64_at(rest, 0), u32_at(rest, 8));
        if table_entries > TABLE_ENTRIES_MAX {
            return Err(invalid("a bitmap table is too large"));
        }
        let file_length = storage.len().map_err(read_error)?;
        let table_length = u64::from(table_entries) * 8;
        if table_offset.checked_add(table_length).is_none_or(|end| end > file_length) {
            return Err(invalid("a bitmap table lies behind the end of the file"));
        }
        if table_length > 0 {
            places.push((table_offset, table_length));
        }
        let table = read_words(storage, table_offset, table_entries as usize)?;
        let clusters = table.iter().map(|entry| entry & OFFSET_MASK).filter(|offset| *offset != 0);
        places.extend(clusters.map(|offset| (offset, cluster)));
        let entry_length = ENTRY_LENGTH + u64::from(u16_at(rest, 18)) + u64::from(u32_at(rest, 20));
        rest = rest.get(entry_length.next_multiple_of(8) as usize..).unwrap_or_default();
    }
    Ok(places)
}
