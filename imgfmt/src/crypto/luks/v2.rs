//! LUKS version 2: a binary header and a JSON text, both twice.
//!
//! | offset | size | field |
//! | ---: | ---: | --- |
//! | 0 | 8 | magic (another one in the second header), version |
//! | 8 | 8 | length of this header with its text, in bytes |
//! | 16 | 8 | number that grows with every change |
//! | 72 | 32 | hash of the checksum |
//! | 104 | 64 | salt, which is only there to make the two headers differ |
//! | 168 | 40 | UUID |
//! | 256 | 8 | offset of this header, in bytes |
//! | 448 | 64 | checksum of header and text, with zeroes in this field |
//! | 4096 | | the text, up to its first zero byte |

use openssl::hash::{DigestBytes, hash};
use serde_json::Value;

use super::field::{MAGIC_SECONDARY, read_exact, text};
use super::header::Header;
use super::json;
use super::keyslots::slots_of;
use super::slot::Slot;
use crate::bytes::{u16_at, u64_at};
use crate::crypto::error::{invalid, library, unsupported};
use crate::crypto::hash::by_name;
use crate::error::Result;
use crate::luks::{MAGIC, SECTOR};
use crate::storage::Storage;

const BINARY: usize = 4096;
const CHECKSUM: std::ops::Range<usize> = 448..512;
/// The lengths that a header with its text can have, which are also the places of the second
/// header.
const LENGTHS: [u64; 9] =
    [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];
/// The maximum length of the text in bytes. That of `cryptsetup` has a few hundred for each of at
/// most 32 slots, and a few thousand for each token. Small values in a text take up to 100 times
/// its length in memory.
const TEXT_MAX: usize = 256 << 10;

pub(super) fn read(storage: &dyn Storage, base: u64) -> Result<Header> {
    let primary = read_copy(storage, base, 0, MAGIC);
    let secondary = match &primary {
        Ok(copy) => read_copy(storage, base, copy.length, MAGIC_SECONDARY).ok(),
        // Its length is not known then.
        Err(_) => LENGTHS
            .into_iter()
            .find_map(|offset| read_copy(storage, base, offset, MAGIC_SECONDARY).ok()),
    };
    let copy = match (primary, secondary) {
        (Ok(primary), Some(secondary)) if secondary.sequence > primary.sequence => secondary,
        (Ok(primary), _) => primary,
        (Err(_), Some(secondary)) => secondary,
        (Err(error), None) => return Err(error),
    };
    decode(&copy)
}

/// One of the two headers, whose checksum is right.
struct Copy {
    length: u64,
    sequence: u64,
    text: Value,
}

fn read_copy(storage: &dyn Storage, base: u64, offset: u64, magic: &[u8]) -> Result<Copy> {
    let mut binary = vec![0; BINARY];
    read_exact(storage, base, offset, &mut binary)?;
    let length = u64_at(&binary, 8);
    let is_one = binary.starts_with(magic) && u16_at(&binary, 6) == 2;
    if !is_one || !LENGTHS.contains(&length) || u64_at(&binary, 256) != offset {
        return Err(invalid("its LUKS header of version 2 is damaged"));
    }
    let mut bytes = binary;
    bytes.resize(length as usize, 0);
    read_exact(storage, base, offset + BINARY as u64, &mut bytes[BINARY..])?;
    let stated = bytes[CHECKSUM].to_vec();
    let digest = checksum(&mut bytes)?;
    if stated.get(..digest.len()) != Some(&*digest) {
        return Err(invalid("the checksum of its LUKS header is wrong"));
    }
    let json = bytes[BINARY..].split(|byte| *byte == 0).next().unwrap_or_default();
    if json.len() > TEXT_MAX {
        let length = json.len();
        return Err(unsupported(format!(
            "the text in its LUKS header has {length} bytes, and more than {TEXT_MAX} are refused"
        )));
    }
    let text = serde_json::from_slice(json)
        .map_err(|_| invalid("the text in its LUKS header is not valid JSON"))?;
    Ok(Copy { length, sequence: u64_at(&bytes, 16), text })
}

/// The checksum of a header with its text. Leaves zeroes in its place.
fn checksum(bytes: &mut [u8]) -> Result<DigestBytes> {
    bytes[CHECKSUM].fill(0);
    let algorithm = by_name(&text(&bytes[72..104])?)?;
    hash(algorithm, bytes).map_err(|error| library(&error))
}

/// Sets the checksum of a header with its text to the right one, by SHA-256.
#[cfg(any(test, feature = "test-util"))]
pub fn seal(header: &mut [u8]) {
    header[72..104].fill(0);
    header[72..78].copy_from_slice(b"sha256");
    if let Ok(digest) = checksum(header) {
        header[CHECKSUM][..digest.len()].copy_from_slice(&digest);
    }
}

fn decode(copy: &Copy) -> Result<Header> {
    let text = &copy.text;
    refuse_requirements(text)?;
    let segments: Vec<_> = json::members(text, "segments")?.collect();
    let [(segment_name, segment)] = segments[..] else {
        return Err(unsupported(format!(
            "its encrypted data has {} segments instead of one: a re-encryption may be unfinished; \
             complete it with 'cryptsetup reencrypt --resume-only'",
            segments.len()
        )));
    };
    refuse_segment(segment)?;
    let payload = json::large(segment, "offset")?;
    let sector_size = u64::from(json::small(segment, "sector_size")?);
    if !sector_size.is_power_of_two() || !(SECTOR..=4096).contains(&sector_size) {
        return Err(invalid(format!("encrypted sectors of {sector_size} bytes are not possible")));
    }
    let size = match json::text(segment, "size")? {
        "dynamic" => None,
        _ => Some(json::large(segment, "size")?),
    };
    let is_aligned = |number: u64| number.is_multiple_of(sector_size);
    if !payload.is_multiple_of(SECTOR) || !size.is_none_or(is_aligned) {
        return Err(invalid("its encrypted data does not consist of complete sectors"));
    }
    let (slots, unusable) = slots_of(text, segment_name, copy.length)?;
    let slots_end = slots.iter().map(Slot::end).max();
    if payload != 0 && payload < slots_end.unwrap_or(0).max(2 * copy.length) {
        return Err(invalid("its encrypted data overlaps its LUKS header"));
    }
    Ok(Header {
        version: 2,
        slots,
        unusable,
        cipher: json::cipher(segment)?,
        payload,
        size,
        sector_size,
        first_number: json::large(segment, "iv_tweak")?,
    })
}

/// Refuses containers in the middle of a change, and those that need what is not known here.
fn refuse_requirements(text: &Value) -> Result<()> {
    let config = json::member(text, "config")?;
    let mandatory = config.get("requirements").and_then(|it| it.get("mandatory"));
    let Some(names) = mandatory.and_then(Value::as_array).filter(|names| !names.is_empty()) else {
        return Ok(());
    };
    let names = names.iter().map(|name| name.as_str().unwrap_or("?").escape_debug().to_string());
    let names: Vec<_> = names.collect();
    Err(unsupported(format!(
        "its LUKS header requires '{}', which is not supported",
        names.join("', '")
    )))
}

fn refuse_segment(segment: &Value) -> Result<()> {
    let kind = json::text(segment, "type")?;
    if kind != "crypt" {
        let kind = kind.escape_debug();
        return Err(unsupported(format!(
            "its data is of the type '{kind}', which is not supported"
        )));
    }
    if segment.get("integrity").is_some() {
        return Err(unsupported("its sectors have integrity tags, which is not supported"));
    }
    match segment.get("flags").and_then(Value::as_array) {
        Some(flags) if !flags.is_empty() => {
            Err(unsupported("its data has flags in the LUKS header, which is not supported"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
