//! A new header, of version 1, with the places that QEMU and `cryptsetup` choose.
//!
//! ```text
//! 0         header
//! 4096      key material of slot 0, 256000 bytes and padding up to 4096
//! ...       the same of the other seven slots
//! 2068480   the data of a volume; in a qcow2 image nothing
//! ```

use openssl::rand::{rand_bytes, rand_priv_bytes};
use zeroize::Zeroizing;

use super::slot::{Digest, Slot};
use super::v1::{empty_slot, slot_bytes};
use crate::backup::Uuid;
use crate::crypto::error::library;
use crate::crypto::hash;
use crate::crypto::kdf::{Kdf, iterations_within};
use crate::crypto::split::STRIPES;
use crate::error::{Error, Result};
use crate::luks::{MAGIC, NEW_HEADER_LENGTH, SECTOR, SLOT_LENGTH, SLOTS_START};
use crate::passphrase::NewKey;

const CIPHER: (&str, &str) = ("aes", "xts-plain64");
/// Two keys of AES-256.
const KEY_LENGTH: usize = 64;
const HASH: &str = "sha256";
/// Key material begins at multiples of this, in bytes.
const ALIGNMENT: u64 = 4096;
/// As in QEMU, the digest of the key takes an eighth of the work of a slot.
const DIGEST_PART: u32 = 8;

/// Makes a header with a new key for the data, which the passphrase opens, and returns it with all
/// key material. Takes as long as the key says.
pub(crate) fn new_header(new: &NewKey) -> Result<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; KEY_LENGTH]);
    rand_priv_bytes(&mut key).map_err(|error| library(&error))?;
    let iterations = iterations_within(new.iteration_time, KEY_LENGTH, hash::by_name(HASH)?)?;
    let digest = Digest::of(&key, HASH, iterations / DIGEST_PART, salt()?)?;
    let first = Slot {
        number: 0,
        kdf: Kdf::Pbkdf2 { hash: HASH.to_owned(), iterations, salt: salt()? },
        cipher: (CIPHER.0.to_owned(), CIPHER.1.to_owned()),
        area_key_length: KEY_LENGTH as u32,
        offset: ALIGNMENT,
        key_length: KEY_LENGTH as u32,
        stripes: STRIPES,
        split_hash: HASH.to_owned(),
        digest,
    };
    let room = first.material_length().next_multiple_of(ALIGNMENT);
    let material = first.seal(&key, &new.passphrase.bytes()?)?;
    let mut bytes = vec![0; NEW_HEADER_LENGTH as usize];
    let mut put = |offset: usize, field: &[u8]| {
        bytes[offset..offset + field.len()].copy_from_slice(field);
    };
    put(0, MAGIC);
    put(6, &1u16.to_be_bytes());
    put(8, CIPHER.0.as_bytes());
    put(40, CIPHER.1.as_bytes());
    put(72, HASH.as_bytes());
    put(104, &((NEW_HEADER_LENGTH / SECTOR) as u32).to_be_bytes());
    put(108, &(KEY_LENGTH as u32).to_be_bytes());
    put(112, &first.digest.digest);
    put(132, &first.digest.salt);
    put(164, &first.digest.iterations.to_be_bytes());
    let uuid = Uuid::random().map_err(|error| Error::from_io("create", error))?;
    put(168, uuid.to_string().as_bytes());
    put(SLOTS_START, &slot_bytes(&first));
    for number in 1..8 {
        let place = SLOTS_START + number * SLOT_LENGTH;
        put(place, &empty_slot(ALIGNMENT + number as u64 * room, STRIPES));
    }
    put(first.offset as usize, &material);
    Ok(bytes)
}

/// Random bytes that need not be secret.
pub(super) fn salt() -> Result<Vec<u8>> {
    let mut salt = vec![0; 32];
    rand_bytes(&mut salt).map_err(|error| library(&error))?;
    Ok(salt)
}
