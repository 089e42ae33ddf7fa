//! LUKS version 1.
//!
//! | offset | size | field |
//! | ---: | ---: | --- |
//! | 0 | 8 | magic, version |
//! | 8 | 32 | cipher, such as `aes` |
//! | 40 | 32 | mode, such as `xts-plain64` |
//! | 72 | 32 | hash of all derivations |
//! | 104 | 4 | start of the data, in sectors |
//! | 108 | 4 | length of the key, in bytes |
//! | 112 | 52 | digest of the key (20), its salt (32) |
//! | 164 | 4 | its iterations |
//! | 168 | 40 | UUID |
//! | 208 | 8 × 48 | slots: state (4), iterations (4), salt (32), start of the key material in sectors (4), stripes (4) |

use super::field::{read_exact, text};
use super::header::Header;
use super::slot::{Digest, Slot};
use crate::bytes::u32_at;
use crate::crypto::error::invalid;
use crate::crypto::kdf::Kdf;
use crate::error::Result;
use crate::luks::{HEADER_LENGTH, SECTOR, SLOT_ACTIVE, SLOT_LENGTH, is_being_removed, slots_of};
use crate::storage::Storage;

/// The state of a slot that is not in use.
pub(super) const SLOT_EMPTY: u32 = 0x0000_dead;

/// The bytes of a slot in use, whose keys are derived by PBKDF2.
pub(super) fn slot_bytes(slot: &Slot) -> [u8; SLOT_LENGTH] {
    let (iterations, salt) = match &slot.kdf {
        Kdf::Pbkdf2 { iterations, salt, .. } => (*iterations, &salt[..]),
        Kdf::Argon2 { .. } => (0, &[][..]),
    };
    let mut bytes = empty_slot(slot.offset, slot.stripes);
    bytes[..4].copy_from_slice(&SLOT_ACTIVE.to_be_bytes());
    bytes[4..8].copy_from_slice(&iterations.to_be_bytes());
    bytes[8..8 + salt.len()].copy_from_slice(salt);
    bytes
}

/// The bytes of a slot that is not in use; `offset` is the place of its key material.
pub(super) fn empty_slot(offset: u64, stripes: u32) -> [u8; SLOT_LENGTH] {
    let mut bytes = [0; SLOT_LENGTH];
    bytes[..4].copy_from_slice(&SLOT_EMPTY.to_be_bytes());
    bytes[40..44].copy_from_slice(&((offset / SECTOR) as u32).to_be_bytes());
    bytes[44..].copy_from_slice(&stripes.to_be_bytes());
    bytes
}

pub(super) fn read(storage: &dyn Storage, base: u64) -> Result<Header> {
    let mut bytes = [0; HEADER_LENGTH];
    read_exact(storage, base, 0, &mut bytes)?;
    let cipher = (text(&bytes[8..40])?, text(&bytes[40..72])?);
    let hash = text(&bytes[72..104])?;
    let payload = u64::from(u32_at(&bytes, 104)) * SECTOR;
    let key_length = u32_at(&bytes, 108);
    let digest = Digest {
        hash: hash.clone(),
        iterations: u32_at(&bytes, 164),
        salt: bytes[132..164].to_vec(),
        digest: bytes[112..132].to_vec(),
    };
    let mut slots = Vec::new();
    for (index, slot) in (0u32..).zip(slots_of(&bytes)) {
        match u32_at(slot, 0) {
            SLOT_ACTIVE if is_being_removed(slot) => continue,
            SLOT_ACTIVE => {}
            SLOT_EMPTY => continue,
            state => {
                return Err(invalid(format!(
                    "key slot {index} of its LUKS header is in the state {state:#x}, which does not exist"
                )));
            }
        }
        let salt = slot[8..40].to_vec();
        let slot = Slot {
            number: index,
            kdf: Kdf::Pbkdf2 { hash: hash.clone(), iterations: u32_at(slot, 4), salt },
            cipher: cipher.clone(),
            area_key_length: key_length,
            offset: u64::from(u32_at(slot, 40)) * SECTOR,
            key_length,
            stripes: u32_at(slot, 44),
            split_hash: hash.clone(),
            digest: digest.clone(),
        };
        slot.check()?;
        if slot.offset < HEADER_LENGTH as u64 || payload != 0 && slot.end() > payload {
            return Err(invalid(format!(
                "key slot {index} of its LUKS header overlaps the header or the data"
            )));
        }
        slots.push(slot);
    }
    let (unusable, size, first_number) = (Vec::new(), None, 0);
    Ok(Header {
        version: 1,
        slots,
        unusable,
        cipher,
        payload,
        size,
        sector_size: SECTOR,
        first_number,
    })
}
