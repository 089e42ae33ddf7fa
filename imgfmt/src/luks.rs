//! The public part of a LUKS header. Nothing is decrypted here.
//!
//! The layout follows the LUKS on-disk format specifications, versions 1 and 2. All numbers are
//! big-endian; sectors have 512 bytes.

use std::io;

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::storage::Storage;
use crate::units::HostOffset;

pub(crate) const MAGIC: &[u8] = b"LUKS\xba\xbe";
pub(crate) const SECTOR: u64 = 512;
/// The length of a header of version 1, which ends with its slots.
pub(crate) const HEADER_LENGTH: usize = 592;
pub(crate) const SLOTS_START: usize = 208;
pub(crate) const SLOT_LENGTH: usize = 48;
/// The length of a new header of version 1 with the key material of its slots, in bytes.
pub(crate) const NEW_HEADER_LENGTH: u64 = 2_068_480;
/// The state of a slot in use.
pub(crate) const SLOT_ACTIVE: u32 = 0x00ac_71f3;
/// The end of the text of a version 2 header, at most.
const JSON_END_MAX: u64 = 4 << 20;
const JSON_START: u64 = 4096;
/// In place of the end of the salt of a slot in use that is being removed: without its salt nothing
/// opens it any more, and its key material is destroyed next. It lies in one sector in every slot.
pub(crate) const SALT_OF_REMOVED: &[u8; 24] = b"nbd-cli: slot is removed";
/// Where that is in the slot.
pub(crate) const SALT_END: std::ops::Range<usize> = 16..40;

/// The encryption of an image, as far as it is known without the key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Encryption {
    /// The old encryption of qcow2 images, by AES in CBC mode.
    Aes,
    /// LUKS, with the contents of its header if that could be read.
    Luks(Option<LuksInfo>),
}

impl Encryption {
    /// Returns the name that QEMU's tools use.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Luks(_) => "luks",
        }
    }
}

/// The contents of a LUKS header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LuksInfo {
    /// Version of the format: 1 or 2.
    pub version: u16,
    /// The UUID of the container.
    pub uuid: String,
    /// Start of the encrypted data in the container, in bytes, if it is known.
    pub payload_offset: Option<u64>,
    /// The contents of a header of version 1.
    pub details: Option<LuksDetails>,
}

/// The encryption of a LUKS container of version 1.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LuksDetails {
    /// The cipher with the length of its key in bits, such as `aes-256`.
    pub cipher: String,
    /// The mode of the cipher, such as `xts`.
    pub cipher_mode: String,
    /// The generator of initialisation vectors, such as `plain64`.
    pub iv_generator: String,
    /// The hash of the generator, if it has one.
    pub iv_generator_hash: Option<String>,
    /// The hash for key derivation.
    pub hash: String,
    /// Iterations for the digest of the master key.
    pub master_key_iterations: u32,
    /// The slots for passphrases.
    pub slots: Vec<LuksSlot>,
}

/// A key slot for a passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LuksSlot {
    /// Whether it holds the master key.
    pub is_active: bool,
    /// Whether its removal was interrupted: it is active, but nothing opens it. Its key material
    /// may still be there until it is removed again.
    pub is_being_removed: bool,
    /// Iterations for deriving its key from the passphrase.
    pub iterations: u32,
    /// Number of stripes into which the master key is split.
    pub stripes: u32,
    /// Start of its key material in the container, in bytes.
    pub key_offset: u64,
}

/// Reads the header of a LUKS container that begins at `offset`; `None` if there is none.
pub(crate) fn read(storage: &dyn Storage, offset: u64) -> io::Result<Option<LuksInfo>> {
    // The header is only described, so an invalid offset is not an error.
    if offset >= storage.len()? {
        return Ok(None);
    }
    let mut header = [0; HEADER_LENGTH];
    let read = storage.read_at(HostOffset::new(offset), &mut header)?;
    if read < header.len() || !header.starts_with(MAGIC) {
        return Ok(None);
    }
    let version = u16_at(&header, 6);
    let (payload_offset, details) = match version {
        1 => (Some(u64::from(u32_at(&header, 104)) * SECTOR), Some(details(&header))),
        2 => (find_segment(storage, offset, u64_at(&header, 8))?, None),
        _ => return Ok(None),
    };
    Ok(Some(LuksInfo { version, uuid: text(&header, 168, 40), payload_offset, details }))
}

fn details(header: &[u8]) -> LuksDetails {
    let (name, mode) = (text(header, 8, 32), text(header, 40, 32));
    let (mode, generator) = mode.split_once('-').unwrap_or((&mode, ""));
    let (generator, hash) = match generator.split_once(':') {
        Some((generator, hash)) => (generator, Some(hash.to_owned())),
        None => (generator, None),
    };
    // XTS has two keys of the same length.
    let keys = if mode == "xts" { 2 } else { 1 };
    let bits = u64::from(u32_at(header, 108)) * 8 / keys;
    let slots = slots_of(header).map(|slot| LuksSlot {
        is_active: u32_at(slot, 0) == SLOT_ACTIVE,
        is_being_removed: is_being_removed(slot),
        iterations: u32_at(slot, 4),
        key_offset: u64::from(u32_at(slot, 40)) * SECTOR,
        stripes: u32_at(slot, 44),
    });
    LuksDetails {
        cipher: format!("{name}-{bits}"),
        cipher_mode: mode.to_owned(),
        iv_generator: generator.to_owned(),
        iv_generator_hash: hash,
        hash: text(header, 72, 32),
        master_key_iterations: u32_at(header, 164),
        slots: slots.collect(),
    }
}

/// The slots of a header of version 1.
pub(crate) fn slots_of(header: &[u8]) -> impl Iterator<Item = &[u8]> {
    header.get(SLOTS_START..HEADER_LENGTH).unwrap_or_default().chunks_exact(SLOT_LENGTH)
}

/// Whether the removal of a slot has begun, and has not ended.
pub(crate) fn is_being_removed(slot: &[u8]) -> bool {
    u32_at(slot, 0) == SLOT_ACTIVE && slot.get(SALT_END) == Some(SALT_OF_REMOVED)
}

/// Where the first segment of data begins, from the text in a header of version 2: the first member
/// `"offset"` after `"segments"`.
fn find_segment(storage: &dyn Storage, offset: u64, length: u64) -> io::Result<Option<u64>> {
    let Some(length) = length.min(JSON_END_MAX).checked_sub(JSON_START) else { return Ok(None) };
    let Some(start) = offset.checked_add(JSON_START) else { return Ok(None) };
    let mut json = vec![0; length as usize];
    let read = storage.read_at(HostOffset::new(start), &mut json)?;
    let json = String::from_utf8_lossy(&json[..read]);
    let segments = json.split_once("\"segments\"").map(|(_, rest)| rest);
    let number = segments.and_then(|rest| rest.split_once("\"offset\""));
    let digits = number.map(|(_, rest)| rest.trim_start_matches([':', ' ', '"']));
    let end = digits.and_then(|digits| digits.find(|character: char| !character.is_ascii_digit()));
    Ok(digits.zip(end).and_then(|(digits, end)| digits[..end].parse().ok()))
}

/// A text that ends at its first zero byte, or at the end of its field.
fn text(header: &[u8], offset: usize, length: usize) -> String {
    let field = header.get(offset..offset + length).unwrap_or_default();
    let field = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(field).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Durability, MemoryStorage};

    #[test]
    fn the_place_of_the_data_is_found_in_the_text_of_version_2() {
        let storage = MemoryStorage::new(16384);
        let write = |offset, bytes: &[u8]| {
            storage.write_at(HostOffset::new(offset), bytes, Durability::Cached).unwrap();
        };
        write(0, b"LUKS\xba\xbe\0\x02\0\0\0\0\0\0\x40\0");
        write(168, b"7f3a");
        assert_eq!(read(&storage, 0).unwrap().unwrap().payload_offset, None);
        write(4096, br#"{"keyslots":{},"segments":{"0":{"type":"crypt","offset":"16777216","#);
        let info = read(&storage, 0).unwrap().unwrap();
        assert_eq!((info.version, &*info.uuid), (2, "7f3a"));
        assert_eq!(info.payload_offset, Some(16_777_216));
        // The length in the header may be anything.
        write(8, &[0xff; 8]);
        assert_eq!(read(&storage, 0).unwrap().unwrap().payload_offset, Some(16_777_216));
        assert_eq!(read(&storage, 16000).unwrap(), None);
        assert_eq!(read(&storage, u64::MAX).unwrap(), None);
    }
}
