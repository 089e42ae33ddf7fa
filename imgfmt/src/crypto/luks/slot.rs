//! Key slots: each holds the key of the volume, encrypted by a key that is derived from a
//! passphrase.

use openssl::memcmp;
use zeroize::Zeroizing;

use super::field::read_exact;
use crate::crypto::cipher::{Direction, SectorCipher};
use crate::crypto::error::invalid;
use crate::crypto::hash;
use crate::crypto::kdf::{Budget, Kdf, pbkdf2};
use crate::crypto::split::{self, STRIPES};
use crate::error::Result;
use crate::luks::SECTOR;
use crate::storage::Storage;

/// The maximum length of a key, in bytes: two keys of AES-256.
pub(super) const KEY_MAX: u32 = 64;

/// The length of the digest of a key in a header of version 1, in bytes.
const DIGEST_LENGTH: usize = 20;

/// A slot in use.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) number: u32,
    pub(super) kdf: Kdf,
    /// The cipher of the key material.
    pub(super) cipher: (String, String),
    /// The length of the key that encrypts it, in bytes.
    pub(super) area_key_length: u32,
    /// Where the key material begins, in bytes from the start of the header.
    pub(super) offset: u64,
    /// The length of the key of the volume, in bytes.
    pub(super) key_length: u32,
    pub(super) stripes: u32,
    pub(super) split_hash: String,
    pub(super) digest: Digest,
}

/// What the key of the volume is known by.
#[derive(Clone, Debug)]
pub(super) struct Digest {
    pub(super) hash: String,
    pub(super) iterations: u32,
    pub(super) salt: Vec<u8>,
    pub(super) digest: Vec<u8>,
}

impl Slot {
    /// The length of its key material in bytes, of complete sectors.
    pub(super) fn material_length(&self) -> u64 {
        (u64::from(self.key_length) * u64::from(self.stripes)).next_multiple_of(SECTOR)
    }

    /// Where its key material ends, in bytes from the start of the header; the maximum if that is
    /// more.
    pub(super) fn end(&self) -> u64 {
        self.offset.saturating_add(self.material_length())
    }

    /// Refuses sizes that no program writes.
    pub(super) fn check(&self) -> Result<()> {
        let lengths = [self.key_length, self.area_key_length];
        if lengths.iter().any(|length| !(16..=KEY_MAX).contains(length)) {
            let [volume, area] = lengths;
            return Err(invalid(format!(
                "keys of {volume} and {area} bytes in a slot are not possible"
            )));
        }
        if !(1..=STRIPES).contains(&self.stripes) {
            return Err(invalid(format!("a key slot of {} stripes is not possible", self.stripes)));
        }
        Ok(())
    }

    /// The key of the volume, if the passphrase opens this slot.
    pub(super) fn open(
        &self,
        storage: &dyn Storage,
        base: u64,
        passphrase: &[u8],
        budget: &mut Budget,
    ) -> Result<Option<Zeroizing<Vec<u8>>>> {
        budget.begin_slot();
        budget.charge(u64::from(self.stripes) * u64::from(self.key_length))?;
        let split_hash = hash::by_name(&self.split_hash)?;
        // Before the expensive step.
        let mut material = Zeroizing::new(vec![0; self.material_length() as usize]);
        read_exact(storage, base, self.offset, &mut material)?;
        let derived = self.kdf.derive(passphrase, self.area_key_length as usize, budget)?;
        let cipher = SectorCipher::new(&self.cipher.0, &self.cipher.1, derived)?;
        // Numbered from 0, whatever the size of the sectors of the data is.
        cipher.apply(Direction::Decrypt, 0, SECTOR as usize, &mut material)?;
        let length = self.key_length as usize;
        let stripes = &material[..length * self.stripes as usize];
        let key = split::merge(stripes, length, split_hash)?;
        Ok(if self.digest.fits(&key, budget)? { Some(key) } else { None })
    }

    /// The key material with which this passphrase opens the slot. `key` is the key of the volume.
    pub(super) fn seal(&self, key: &[u8], passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
        let hash = hash::by_name(&self.split_hash)?;
        let mut material = split::split(key, self.stripes as usize, hash)?;
        // A buffer that grows would leave a copy behind.
        if material.len() as u64 != self.material_length() {
            let mut padded = Zeroizing::new(vec![0; self.material_length() as usize]);
            padded[..material.len()].copy_from_slice(&material);
            material = padded;
        }
        let mut budget = Budget::default();
        let derived = self.kdf.derive(passphrase, self.area_key_length as usize, &mut budget)?;
        let cipher = SectorCipher::new(&self.cipher.0, &self.cipher.1, derived)?;
        cipher.apply(Direction::Encrypt, 0, SECTOR as usize, &mut material)?;
        Ok(material)
    }
}

impl Digest {
    /// The digest of a key.
    pub(super) fn of(key: &[u8], hash: &str, iterations: u32, salt: Vec<u8>) -> Result<Self> {
        let mut digest = vec![0; DIGEST_LENGTH];
        let function = hash::by_name(hash)?;
        pbkdf2(key, (&salt, iterations, function), &mut digest, &mut Budget::default())?;
        Ok(Self { hash: hash.to_owned(), iterations, salt, digest })
    }

    fn fits(&self, key: &[u8], budget: &mut Budget) -> Result<bool> {
        let hash = hash::by_name(&self.hash)?;
        let mut digest = vec![0; self.digest.len()];
        pbkdf2(key, (&self.salt, self.iterations, hash), &mut digest, budget)?;
        Ok(!digest.is_empty() && memcmp::eq(&digest, &self.digest))
    }
}
