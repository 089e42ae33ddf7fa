//! The bitmap directory: one entry per bitmap, contiguous in the file.
//!
//! Section "Bitmaps extension" of the format's specification. An entry, padded to 8 bytes:
//!
//! ```text
//!  0 table_offset (8)   8 table_size (4)   12 flags (4)   16 type (1)   17 granularity_bits (1)
//! 18 name_size (2)     20 extra_data_size (4)   24 extra data   then the name
//! ```
//!
//! QEMU refuses the complete image because of one bad entry. Here a bad entry is one bad bitmap;
//! all bitmaps are lost only if the list itself is unreadable.

use std::collections::HashSet;

use crate::bitmap::{BITMAP_NAME_BYTES_MAX, GRANULARITY_BITS_MAX, GRANULARITY_BITS_MIN};
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::error::system_words;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::header::{Header, autoclear};
use crate::storage::Storage;
use crate::units::HostOffset;

const ENTRY_LENGTH: u64 = 24;
const EXTENSION_LENGTH: usize = 24;
pub(super) const BITMAPS_MAX: usize = 65535;
pub(super) const DIRECTORY_BYTES_MAX: u64 = 1024 * BITMAPS_MAX as u64;
/// The clusters of one bitmap hold no more than this.
const BITMAP_BYTES_MAX: u64 = 512 << 20;
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const TYPE_DIRTY_TRACKING: u8 = 1;
/// Where the flags are in an entry.
const FLAGS: u64 = 12;

/// Flags of an entry.
pub(super) mod flag {
    pub(crate) const IN_USE: u32 = 1;
    pub(crate) const AUTO: u32 = 1 << 1;
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) table: Table,
    pub(super) flags: u32,
    pub(super) granularity_bits: u32,
    pub(super) name: Vec<u8>,
    /// The damage, as a clause, and the bytes of the entry.
    pub(super) damage: Option<(String, Vec<u8>)>,
}

/// The location of the table of a bitmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub(super) offset: HostOffset,
    pub(super) entries: u32,
}

/// The location of the directory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DirectoryLocation {
    pub(super) offset: HostOffset,
    pub(super) length: u64,
}

/// Reads the directory, if the image has a valid one. An error says, as a clause, what is wrong.
pub(super) fn read(
    storage: &dyn Storage,
    header: &Header,
) -> Result<Option<(DirectoryLocation, Vec<Entry>)>, String> {
    let (true, Some(content)) =
        (header.version >= 3 && header.autoclear & autoclear::BITMAPS != 0, header.bitmaps())
    else {
        // A program that does not support bitmaps has cleared the bit: the extension is out of
        // date.
        return Ok(None);
    };
    let (place, count) = decode_extension(content, header.geometry)?;
    let file_length = storage.len().map_err(|error| system_words(&error))?;
    if place.offset.checked_add(place.length).is_none_or(|end| end.bytes() > file_length) {
        return Err("its bitmap directory lies past the end of the file".into());
    }
    let mut bytes = vec![0; place.length as usize];
    storage.read_exact_at(place.offset, &mut bytes).map_err(|error| {
        format!("its bitmap directory cannot be read: {}", system_words(&error))
    })?;
    Ok(Some((place, decode(&bytes, count, header)?)))
}

/// Decodes the header extension: the location of the directory and its number of entries.
fn decode_extension(
    content: &[u8],
    geometry: Geometry,
) -> Result<(DirectoryLocation, usize), String> {
    if content.len() != EXTENSION_LENGTH || u32_at(content, 4) != 0 {
        return Err("its bitmaps extension is damaged".into());
    }
    let count = u32_at(content, 0) as usize;
    let place = DirectoryLocation {
        offset: HostOffset::new(u64_at(content, 16)),
        length: u64_at(content, 8),
    };
    let is_possible = (1..=BITMAPS_MAX).contains(&count)
        && place.length <= DIRECTORY_BYTES_MAX
        && place.length >= count as u64 * ENTRY_LENGTH
        && place.offset.bytes() != 0
        && geometry.in_cluster(place.offset) == 0;
    match is_possible {
        true => Ok((place, count)),
        false => Err(format!(
            "its bitmap directory of {count} bitmaps in {} bytes at offset {} is invalid",
            place.length, place.offset
        )),
    }
}

/// The content of the header extension for a directory.
pub(super) fn encode_extension(place: DirectoryLocation, count: usize) -> Vec<u8> {
    let mut content = Vec::with_capacity(EXTENSION_LENGTH);
    content.extend((count as u32).to_be_bytes());
    content.extend([0; 4]);
    content.extend(place.length.to_be_bytes());
    content.extend(place.offset.bytes().to_be_bytes());
    content
}

/// Decodes the entries, which must fill the directory exactly.
pub(super) fn decode(bytes: &[u8], count: usize, header: &Header) -> Result<Vec<Entry>, String> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut rest = bytes;
    for index in 0..count {
        let name_length = u64::from(u16_at(rest, 18));
        let name_start = ENTRY_LENGTH + u64::from(u32_at(rest, 20));
        let length = (name_start + name_length).next_multiple_of(8);
        if (rest.len() as u64) < ENTRY_LENGTH || length > rest.len() as u64 {
            return Err(format!("entry {index} of its bitmap directory is cut off"));
        }
        let (raw, behind) = rest.split_at(length as usize);
        let name = raw[name_start as usize..][..name_length as usize].to_vec();
        let mut entry = Entry {
            table: Table { offset: HostOffset::new(u64_at(raw, 0)), entries: u32_at(raw, 8) },
            flags: u32_at(raw, FLAGS as usize),
            granularity_bits: u32::from(raw[17]),
            name,
            damage: None,
        };
        let damage = entry.find_damage(raw, header);
        entry.damage = damage.map(|detail| (detail, raw.to_vec()));
        entries.push(entry);
        rest = behind;
    }
    match rest.is_empty() {
        true => Ok(entries),
        false => Err("its bitmap directory is longer than its entries".into()),
    }
}

/// Marks all but the first of several bitmaps of one name as damaged.
pub(super) fn refuse_equal_names(entries: &mut [Entry]) {
    let mut names = HashSet::new();
    for entry in entries {
        if !names.insert(entry.name.clone()) && entry.damage.is_none() {
            let (raw, _) = encode(std::slice::from_ref(entry));
            entry.damage = Some(("another bitmap has the same name".into(), raw));
        }
    }
}

/// The directory of these entries, and the offset of each entry's flags in it.
pub(super) fn encode(entries: &[Entry]) -> (Vec<u8>, Vec<u64>) {
    let (mut bytes, mut flags_places) = (Vec::new(), Vec::new());
    for entry in entries {
        let start = bytes.len();
        flags_places.push(start as u64 + FLAGS);
        if let Some((_, raw)) = &entry.damage {
            bytes.extend(raw);
            bytes[start + FLAGS as usize..][..4].copy_from_slice(&entry.flags.to_be_bytes());
            continue;
        }
        bytes.extend(entry.table.offset.bytes().to_be_bytes());
        bytes.extend(entry.table.entries.to_be_bytes());
        bytes.extend(entry.flags.to_be_bytes());
        bytes.extend([TYPE_DIRTY_TRACKING, entry.granularity_bits as u8]);
        bytes.extend((entry.name.len() as u16).to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&entry.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    (bytes, flags_places)
}

impl Entry {
    fn find_damage(&self, raw: &[u8], header: &Header) -> Option<String> {
        let geometry = header.geometry;
        let bytes = u64::from(self.table.entries) << geometry.cluster_bits;
        let granularities = GRANULARITY_BITS_MIN..=GRANULARITY_BITS_MAX;
        let holds = |bytes: u64| (u128::from(bytes) * 8) << self.granularity_bits;
        if raw[16] != TYPE_DIRTY_TRACKING {
            return Some(format!("it is of type {}, which does not exist", raw[16]));
        }
        if u32_at(raw, 20) != 0 {
            return Some("it has extra data of an unknown kind".into());
        }
        if self.flags & !(flag::IN_USE | flag::AUTO) != 0 {
            return Some(format!("it has unknown flags ({:#x})", self.flags));
        }
        if !granularities.contains(&self.granularity_bits) {
            return Some(format!("a granularity of 2^{} is invalid", self.granularity_bits));
        }
        if self.name.is_empty() || self.name.len() > BITMAP_NAME_BYTES_MAX {
            return Some(format!("its name has {} bytes", self.name.len()));
        }
        let is_place =
            self.table.offset.bytes() != 0 && geometry.in_cluster(self.table.offset) == 0;
        if bytes > BITMAP_BYTES_MAX || !is_place && self.table.entries > 0 {
            return Some(format!(
                "its table of {} entries at offset {} is invalid",
                self.table.entries, self.table.offset
            ));
        }
        if self.flags & flag::IN_USE == 0 && u128::from(header.size) > holds(bytes) {
            return Some("its table is too short for the disk".into());
        }
        None
    }
}
