//! The metadata of the disk (MS-VHDX, section 2.6): its size, its blocks, its parent.
//!
//! | table | size | field, little-endian |
//! | ---: | ---: | --- |
//! | 0 | 8 | `metadata` |
//! | 10 | 2 | number of entries |
//! | 32 | 32 each | GUID, offset in the region (4 bytes), length (4 bytes), flags (4 bytes): 0 of a user, 1 of the virtual disk, 2 must be known |

use std::ffi::OsString;

use super::header::{ENTRIES_MAX, Guid, MIB, Region, guid_at, shown};
use crate::bytes::{u16_le_at, u32_le_at, u64_le_at};
use crate::error::Result;
use crate::format::Format;
use crate::formats::file::ImageFile;
use crate::formats::foreign::{Identity, Parent};

const TABLE_LENGTH: u64 = 64 << 10;
const ENTRY: usize = 32;

/// The longest item, in bytes: a locator of a parent has a few paths.
const ITEM_MAX: u32 = 1 << 20;

/// Most pairs in the locator of a parent; five are known.
const PAIRS_MAX: usize = 64;

/// The largest disk, in bytes.
pub(super) const SIZE_MAX: u64 = 64 << 40;

/// Size of blocks and type of image: caa16737-fa36-4d43-b3b6-33f0aa44e76b.
pub(super) const FILE_PARAMETERS: Guid =
    *b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b";
/// 2fa54224-cd1b-4876-b211-5dbed83bf4b8.
pub(super) const DISK_SIZE: Guid =
    *b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8";
/// beca12ab-b2e6-4523-93ef-c309e000c746.
pub(super) const DISK_ID: Guid =
    *b"\xab\x12\xca\xbe\xe6\xb2\x23\x45\x93\xef\xc3\x09\xe0\x00\xc7\x46";
/// 8141bf1d-a96f-4709-ba47-f233a8faab5f.
pub(super) const LOGICAL_SECTOR: Guid =
    *b"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f";
/// cda348c7-445d-4471-9cc9-e9885251c556.
pub(super) const PHYSICAL_SECTOR: Guid =
    *b"\xc7\x48\xa3\xcd\x5d\x44\x71\x44\x9c\xc9\xe9\x88\x52\x51\xc5\x56";
/// a8d35f2d-b30b-454d-abf7-d3d84834ab0c.
const PARENT_LOCATOR: Guid = *b"\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c";

/// The only type of parent that there is: b04aefb7-d19e-4a81-b789-25b8e9445913.
const VHDX_PARENT: Guid = *b"\xb7\xef\x4a\xb0\x9e\xd1\x81\x4a\xb7\x89\x25\xb8\xe9\x44\x59\x13";

/// What the disk is.
#[derive(Debug)]
pub(super) struct Metadata {
    /// In bytes.
    pub(super) size: u64,
    pub(super) block_size: u64,
    pub(super) sector: u64,
    /// All blocks have their places, whether they were written or not.
    pub(super) is_fixed: bool,
    pub(super) parent: Option<Parent>,
}

/// The items that matter, as the table has them.
#[derive(Debug, Default)]
struct Items {
    parameters: Option<Vec<u8>>,
    size: Option<Vec<u8>>,
    sector: Option<Vec<u8>>,
    locator: Option<Vec<u8>>,
}

impl Metadata {
    pub(super) fn read(region: Region, file: &ImageFile) -> Result<Self> {
        let items = Items::read(region, file)?;
        let (Some(parameters), Some(size), Some(sector)) =
            (items.parameters, items.size, items.sector)
        else {
            return Err(file.invalid("it lacks the size of its disk, of its blocks or of sectors"));
        };
        let (block_size, flags) = (u32_le_at(&parameters, 0), u32_le_at(&parameters, 4));
        let (size, sector) = (u64_le_at(&size, 0), u32_le_at(&sector, 0));
        if !(MIB as u32..=256 << 20).contains(&block_size) || !block_size.is_power_of_two() {
            return Err(file.invalid(format!("its blocks of {block_size} bytes cannot be")));
        }
        let sector = u64::from(sector);
        if !matches!(sector, 512 | 4096) || size > SIZE_MAX || !size.is_multiple_of(sector) {
            let detail = format!("its {size} bytes in sectors of {sector} cannot be");
            return Err(file.invalid(detail));
        }
        let parent = match (flags & 2 != 0, items.locator) {
            (false, _) => None,
            (true, Some(locator)) => Some(parent(&locator, file)?),
            (true, None) => return Err(file.invalid(NAMELESS)),
        };
        let block_size = u64::from(block_size);
        Ok(Self { size, block_size, sector, is_fixed: flags & 1 != 0, parent })
    }
}

impl Items {
    fn read(region: Region, file: &ImageFile) -> Result<Self> {
        let table = file.read_up_to(region.offset, TABLE_LENGTH.min(region.length))?;
        let count = usize::from(u16_le_at(&table, 10));
        if !table.starts_with(b"metadata") || count > ENTRIES_MAX {
            return Err(file.invalid("its metadata has no table that makes sense"));
        }
        let mut items = Self::default();
        for entry in table.get(ENTRY..).unwrap_or_default().chunks_exact(ENTRY).take(count) {
            let guid = guid_at(entry, 0);
            let (offset, length) = (u32_le_at(entry, 16), u32_le_at(entry, 20));
            let (is_of_user, must_be_known) =
                (u32_le_at(entry, 24) & 1 != 0, u32_le_at(entry, 24) & 4 != 0);
            let place = match guid {
                FILE_PARAMETERS if !is_of_user => &mut items.parameters,
                DISK_SIZE if !is_of_user => &mut items.size,
                LOGICAL_SECTOR if !is_of_user => &mut items.sector,
                PARENT_LOCATOR if !is_of_user => &mut items.locator,
                DISK_ID | PHYSICAL_SECTOR if !is_of_user => continue,
                _ if !must_be_known => continue,
                guid => {
                    let detail = format!("it needs metadata that is not known, {}", shown(&guid));
                    return Err(file.unsupported(detail));
                }
            };
            let end = u64::from(offset) + u64::from(length);
            if u64::from(offset) < TABLE_LENGTH || end > region.length || length > ITEM_MAX {
                return Err(file.invalid("an item of its metadata lies where none can be"));
            }
            let item = file.read_up_to(region.offset + u64::from(offset), u64::from(length))?;
            if place.replace(item).is_some() {
                return Err(file.invalid("it has an item of metadata twice"));
            }
        }
        Ok(items)
    }
}

/// Reads the locator of a parent (section 2.6.2.6): its type, and pairs of keys and values in
/// UTF-16.
fn parent(locator: &[u8], file: &ImageFile) -> Result<Parent> {
    if guid_at(locator, 0) != VHDX_PARENT {
        let detail =
            format!("its parent is of a kind that is not known, {}", shown(&guid_at(locator, 0)));
        return Err(file.unsupported(detail));
    }
    let count = usize::from(u16_le_at(locator, 18));
    if count > PAIRS_MAX {
        return Err(file.invalid(format!("the locator of its parent has {count} pairs")));
    }
    let pairs = locator.get(20..).unwrap_or_default().chunks_exact(12).take(count);
    let bytes = |offset: u32, length: u16| -> Option<&[u8]> {
        locator.get(offset as usize..)?.get(..usize::from(length))
    };
    // Pairs may overlap, so only the values that are wanted are decoded.
    let value = |wanted: &str| -> Option<String> {
        let is_wanted = |pair: &&[u8]| {
            let key = bytes(u32_le_at(pair, 0), u16_le_at(pair, 8));
            key.is_some_and(|key| key.iter().copied().eq(wanted.bytes().flat_map(|byte| [byte, 0])))
        };
        let pair = pairs.clone().find(is_wanted)?;
        let value = bytes(u32_le_at(pair, 4), u16_le_at(pair, 10))?;
        let units = value.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
        let value: String = char::decode_utf16(units).collect::<Result<_, _>>().ok()?;
        (!value.is_empty()).then_some(value)
    };
    let Some(linkage) = value("parent_linkage").and_then(|text| guid_from(&text)) else {
        return Err(file.invalid("it does not say which image its parent is"));
    };
    let mut names: Vec<OsString> = Vec::new();
    let mut add = |name: &str| {
        if !name.is_empty() && !names.iter().any(|known| known == name) {
            names.push(name.into());
        }
    };
    if let Some(path) = value("relative_path") {
        add(&path.replace('\\', "/"));
    }
    // Paths of the machine that made the image; the parent is known by its identity.
    for key in ["relative_path", "volume_path", "absolute_win32_path"] {
        let path = value(key).unwrap_or_default();
        add(path.rsplit(['\\', '/']).next().unwrap_or_default());
    }
    if names.is_empty() {
        return Err(file.invalid(NAMELESS));
    }
    Ok(Parent { names, format: Some(Format::Vhdx), identity: Some(Identity(linkage)) })
}

/// Reads a GUID as people write it, in braces.
fn guid_from(text: &str) -> Option<Guid> {
    let text = text.trim().strip_prefix('{')?.strip_suffix('}')?;
    let parts: Vec<&str> = text.split('-').collect();
    let lengths = parts.iter().map(|part| part.len());
    if !lengths.eq([8, 4, 4, 4, 12]) || !text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit()) {
        return None;
    }
    let number = u128::from_str_radix(&parts.concat(), 16).ok()?;
    let mut guid = number.to_be_bytes();
    // The first three parts are numbers.
    guid[..4].reverse();
    guid[4..6].reverse();
    guid[6..8].reverse();
    Some(guid)
}

const NAMELESS: &str = "it has only what changed since another image, which it does not name";

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::MemoryStorage;

    #[test]
    fn pairs_of_a_locator_that_overlap_are_not_all_decoded() {
        let file = ImageFile::new(Arc::new(MemoryStorage::from_bytes(&[0; 512])), None).unwrap();
        let units = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>();
        let locator = |filler: usize| {
            let mut bytes = VHDX_PARENT.to_vec();
            bytes.extend([0, 0]);
            bytes.extend((filler as u16 + 2).to_le_bytes());
            let mut texts = Vec::new();
            let start = (20 + (filler + 2) * 12) as u32;
            for _ in 0..filler {
                // Both are most of what follows, and no text.
                bytes.extend([start.to_le_bytes(), start.to_le_bytes()].concat());
                bytes.extend([0xff; 4]);
            }
            let guid = "{83ED0EC3-24C8-49A6-A959-5E4BF1288BFB}";
            for (key, value) in [("parent_linkage", guid), ("relative_path", ".\\base.vhdx")] {
                let (key, value) = (units(key), units(value));
                bytes.extend((start + texts.len() as u32).to_le_bytes());
                bytes.extend((start + (texts.len() + key.len()) as u32).to_le_bytes());
                bytes.extend((key.len() as u16).to_le_bytes());
                bytes.extend((value.len() as u16).to_le_bytes());
                texts.extend([key, value].concat());
            }
            texts.resize(1 << 17, 0xd8);
            [bytes, texts].concat()
        };
        let found = parent(&locator(PAIRS_MAX - 2), &file).unwrap();
        assert_eq!(found.names, ["./base.vhdx", "base.vhdx"]);
        for filler in [PAIRS_MAX - 1, 65_533] {
            let error = parent(&locator(filler), &file).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{error}");
        }
    }

    #[test]
    fn a_guid_is_read_as_it_is_shown() {
        let text = "83ed0ec3-24c8-49a6-a959-5e4bf1288bfb";
        let guid = guid_from(&format!("{{{}}}", text.to_uppercase())).unwrap();
        assert_eq!(guid[..8], [0xc3, 0x0e, 0xed, 0x83, 0xc8, 0x24, 0xa6, 0x49]);
        assert_eq!(shown(&guid), text);
        for text in [
            "",
            "{}",
            text,
            "{83ed0ec3-24c8-49a6-a959-5e4bf1288bf}",
            "{+3ed0ec3-24c8-49a6-a959-5e4bf1288bfb}",
        ] {
            assert_eq!(guid_from(text), None, "{text}");
        }
    }
}
