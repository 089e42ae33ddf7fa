//! The headers of the file and its table of regions (MS-VHDX, sections 2.2.2 and 2.2.3).
//!
//! There are two headers, at 64 and 128 KiB, of which the one with the higher sequence number
//! counts, and two copies of the table, at 192 and 256 KiB. All numbers are little-endian.
//!
//! | header | size | field |
//! | ---: | ---: | --- |
//! | 0 | 4 | `head` |
//! | 4 | 4 | CRC-32C of 4 KiB |
//! | 8 | 8 | sequence number |
//! | 32 | 16 | data write GUID: a child knows the image by it |
//! | 48 | 16 | log GUID: of the entries that are to be replayed; 0 if there are none |
//! | 64 | 2 | version of the log, 0 |
//! | 66 | 2 | version, 1 |
//! | 68 | 4 | length of the log |
//! | 72 | 8 | offset of the log |
//!
//! | table | size | field |
//! | ---: | ---: | --- |
//! | 0 | 4 | `regi` |
//! | 4 | 4 | CRC-32C of 64 KiB |
//! | 8 | 4 | number of entries |
//! | 16 | 32 each | GUID, offset (8 bytes), length (4 bytes), whether it must be known (4 bytes) |

use super::crc32c;
use crate::bytes::{u16_le_at, u32_le_at, u64_le_at};
use crate::error::Result;
use crate::formats::file::ImageFile;
use crate::formats::new::random;
use crate::storage::Durability;
use crate::units::HostOffset;

pub(super) type Guid = [u8; 16];

pub(super) const MIB: u64 = 1 << 20;

pub(super) const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
pub(super) const HEADER_LENGTH: u64 = 4096;
pub(super) const TABLES: [u64; 2] = [192 << 10, 256 << 10];
pub(super) const TABLE_LENGTH: u64 = 64 << 10;

/// Most entries of a table of regions or of metadata.
pub(super) const ENTRIES_MAX: usize = 2047;
pub(super) const ENTRY: usize = 32;

/// The table of blocks: 2dc27766-f623-4200-9d64-115e9bfd4a08.
pub(super) const BAT: Guid = *b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08";
/// Metadata: 8b7ca206-4790-4b9a-b8fe-575f050f886e.
pub(super) const METADATA: Guid =
    *b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";

/// The header that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    sequence: u64,
    pub(super) data_write: Guid,
    /// Which entries of the log are to be replayed, if any are.
    pub(super) log: Option<Guid>,
    /// Where the log is, in bytes.
    pub(super) log_offset: u64,
    pub(super) log_length: u64,
}

impl Header {
    pub(super) fn read(file: &ImageFile) -> Result<Self> {
        Self::that_counts(file).map(|(header, ..)| header)
    }

    /// The header that counts, where it is, and its bytes.
    fn that_counts(file: &ImageFile) -> Result<(Self, u64, Vec<u8>)> {
        let mut best: Option<(Self, u64, Vec<u8>)> = None;
        for offset in HEADERS {
            let bytes = file.read_up_to(offset, HEADER_LENGTH)?;
            let is_whole = bytes.len() as u64 == HEADER_LENGTH && bytes.starts_with(b"head");
            if !is_whole || !crc32c::is_sound(&bytes) {
                continue;
            }
            let found = Self::parse(&bytes, file)?;
            match best {
                Some((other, ..)) if other.sequence == found.sequence && other != found => {
                    return Err(file.invalid("its two headers have the same number and differ"));
                }
                Some((other, ..)) if other.sequence >= found.sequence => {}
                _ => best = Some((found, offset, bytes)),
            }
        }
        best.ok_or_else(|| file.invalid("neither of its two headers has the right checksum"))
    }

    /// Writes two headers without a log, first in the place of the one that does not count: there
    /// is a sound one at any time.
    pub(super) fn clear_log(file: &ImageFile) -> Result<()> {
        let (header, place, mut bytes) = Self::that_counts(file)?;
        let other = HEADERS.into_iter().find(|offset| *offset != place).unwrap_or(place);
        // The file was changed, the disk was not.
        bytes[16..32].copy_from_slice(&random()?);
        bytes[48..64].fill(0);
        for (more, place) in (1..).zip([other, place]) {
            let Some(sequence) = header.sequence.checked_add(more) else {
                return Err(
                    file.unsupported("its headers have the highest number that is possible")
                );
            };
            bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
            crc32c::seal(&mut bytes);
            let written =
                file.storage().write_at(HostOffset::new(place), &bytes, Durability::Cached);
            let written = written.and_then(|()| file.storage().sync());
            written.map_err(|error| file.io("write a header of", error, 0))?;
        }
        Ok(())
    }

    fn parse(bytes: &[u8], file: &ImageFile) -> Result<Self> {
        let (log_version, version) = (u16_le_at(bytes, 64), u16_le_at(bytes, 66));
        if version != 1 {
            return Err(file.unsupported(format!("its version is {version}, and only 1 is known")));
        }
        let log = Some(guid_at(bytes, 48)).filter(|guid| *guid != Guid::default());
        if log.is_some() && log_version != 0 {
            return Err(file.unsupported(format!("its log has the version {log_version}")));
        }
        Ok(Self {
            sequence: u64_le_at(bytes, 8),
            data_write: guid_at(bytes, 32),
            log,
            log_offset: u64_le_at(bytes, 72),
            log_length: u64::from(u32_le_at(bytes, 68)),
        })
    }
}

/// A part of the file, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// The regions of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Regions {
    pub(super) bat: Region,
    pub(super) metadata: Region,
}

impl Regions {
    /// Reads the first copy of the table that is sound.
    pub(super) fn read(file: &ImageFile) -> Result<Self> {
        for offset in TABLES {
            let bytes = file.read_up_to(offset, TABLE_LENGTH)?;
            let is_whole = bytes.len() as u64 == TABLE_LENGTH && bytes.starts_with(b"regi");
            if is_whole && crc32c::is_sound(&bytes) {
                return Self::parse(&bytes, file);
            }
        }
        Err(file.invalid("neither copy of its table of regions has the right checksum"))
    }

    fn parse(bytes: &[u8], file: &ImageFile) -> Result<Self> {
        let count = u32_le_at(bytes, 8) as usize;
        if count > ENTRIES_MAX {
            return Err(file.invalid(format!("its table of regions has {count} entries")));
        }
        let (mut bat, mut metadata) = (None, None);
        for entry in bytes[16..].chunks_exact(ENTRY).take(count) {
            let place = match guid_at(entry, 0) {
                BAT => &mut bat,
                METADATA => &mut metadata,
                _ if u32_le_at(entry, 28) & 1 == 0 => continue,
                guid => {
                    let detail = format!("it needs a region that is not known, {}", shown(&guid));
                    return Err(file.unsupported(detail));
                }
            };
            let region =
                Region { offset: u64_le_at(entry, 16), length: u64::from(u32_le_at(entry, 24)) };
            let is_aligned = region.offset.is_multiple_of(MIB) && region.length.is_multiple_of(MIB);
            if region.offset < MIB || !is_aligned || !file.has(region.offset, region.length) {
                return Err(
                    file.invalid("a region of its metadata lies beyond the end of the file")
                );
            }
            if place.replace(region).is_some() {
                return Err(file.invalid("it has a region twice"));
            }
        }
        let (Some(bat), Some(metadata)) = (bat, metadata) else {
            return Err(file.invalid("it lacks the region of blocks or that of metadata"));
        };
        Ok(Self { bat, metadata })
    }
}

pub(super) fn guid_at(bytes: &[u8], offset: usize) -> Guid {
    let bytes = bytes.get(offset..).unwrap_or_default();
    bytes.first_chunk().copied().unwrap_or_default()
}

/// As people write it.
pub(super) fn shown(guid: &Guid) -> String {
    let (one, two, three) = (u32_le_at(guid, 0), u16_le_at(guid, 4), u16_le_at(guid, 6));
    let rest = u64::from_be_bytes(guid.last_chunk().copied().unwrap_or_default());
    format!("{one:08x}-{two:04x}-{three:04x}-{:04x}-{:012x}", rest >> 48, rest & 0xffff_ffff_ffff)
}
