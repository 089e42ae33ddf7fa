//! A header of either version.

use zeroize::Zeroizing;

use super::slot::Slot;
use crate::crypto::cipher::SectorCipher;
use crate::crypto::error::invalid;
use crate::crypto::kdf::Budget;
use crate::error::{Error, ErrorKind, Result};
use crate::passphrase::Passphrase;
use crate::storage::Storage;

/// What a header says, of either version.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) slots: Vec<Slot>,
    /// Cipher and mode of the data, such as `aes` and `xts-plain64`.
    pub(super) cipher: (String, String),
    /// Where the data begins, in bytes from the start of the header.
    pub(super) payload: u64,
    pub(super) size: Option<u64>,
    pub(super) sector_size: u64,
    pub(super) first_number: u64,
}

impl Header {
    /// Tries every passphrase with every slot.
    pub(super) fn find_key(
        &self,
        storage: &dyn Storage,
        base: u64,
        passphrases: &[Passphrase],
    ) -> Result<SectorCipher> {
        if passphrases.is_empty() {
            let detail = "it is encrypted, and no passphrase was given";
            return Err(Error::new(ErrorKind::KeyRequired, "open", detail));
        }
        if self.slots.is_empty() {
            return Err(invalid("its LUKS header has no slot in use, so nothing can open it"));
        }
        let mut problem = None;
        for passphrase in passphrases {
            let mut budget = Budget::default();
            for slot in &self.slots {
                match slot.open(storage, base, passphrase.bytes(), &mut budget) {
                    Ok(Some(key)) => return self.cipher(key),
                    Ok(None) => {}
                    // Another slot may be the right one.
                    Err(error) => problem = problem.or(Some(error)),
                }
            }
        }
        let wrong = || {
            let detail = match passphrases {
                [_] => "the passphrase or key file opens none of its key slots",
                _ => "none of the passphrases or key files opens a key slot of it",
            };
            Error::new(ErrorKind::KeyRequired, "open", detail)
        };
        Err(problem.unwrap_or_else(wrong))
    }

    fn cipher(&self, key: Zeroizing<Vec<u8>>) -> Result<SectorCipher> {
        SectorCipher::new(&self.cipher.0, &self.cipher.1, key)
    }
}
