//! A header of either version.

use std::collections::BTreeMap;

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
    pub(super) version: u16,
    /// By ascending numbers.
    pub(super) slots: Vec<Slot>,
    /// The numbers of the slots that are damaged or unknown, with the reasons.
    pub(super) unusable: Vec<(u32, Error)>,
    /// Cipher and mode of the data, such as `aes` and `xts-plain64`.
    pub(super) cipher: (String, String),
    /// Where the data begins, in bytes from the start of the header.
    pub(super) payload: u64,
    pub(super) size: Option<u64>,
    pub(super) sector_size: u64,
    pub(super) first_number: u64,
}

impl Header {
    /// The cipher of the data, by the first passphrase that opens a slot.
    pub(super) fn find_key(
        &self,
        storage: &dyn Storage,
        base: u64,
        passphrases: &[Passphrase],
    ) -> Result<SectorCipher> {
        let (_, key) = self.find_slot(storage, base, passphrases)?;
        SectorCipher::new(&self.cipher.0, &self.cipher.1, key)
    }

    /// Tries every passphrase with every slot. Returns the number of the first slot that one opens,
    /// and the key in it.
    pub(super) fn find_slot(
        &self,
        storage: &dyn Storage,
        base: u64,
        passphrases: &[Passphrase],
    ) -> Result<(u32, Zeroizing<Vec<u8>>)> {
        if passphrases.is_empty() {
            let detail = "it is encrypted, and no passphrase was given";
            return Err(Error::new(ErrorKind::KeyRequired, "open", detail));
        }
        if self.slots.is_empty() {
            return Err(invalid("its LUKS header has no slot in use, so nothing can open it"));
        }
        let (mut failed, mut line_breaks) = (BTreeMap::new(), false);
        for passphrase in passphrases {
            let bytes = passphrase.bytes()?;
            line_breaks |= bytes.ends_with(b"\n");
            let mut budget = Budget::default();
            for slot in &self.slots {
                match slot.open(storage, base, &bytes, &mut budget) {
                    Ok(Some(key)) => return Ok((slot.number, key)),
                    Ok(None) => {}
                    // Another slot may be the right one.
                    Err(error) => {
                        failed.entry(slot.number).or_insert(error);
                    }
                }
            }
        }
        if failed.len() == self.slots.len()
            && let Some((_, error)) = failed.pop_first()
        {
            return Err(error);
        }
        Err(wrong(passphrases, &self.skipped(&failed), line_breaks))
    }

    /// The slots that could not be tried, with the reason for the first one.
    fn skipped(&self, failed: &BTreeMap<u32, Error>) -> String {
        let mut all: BTreeMap<_, _> = failed.iter().collect();
        all.extend(self.unusable.iter().map(|(number, error)| (number, error)));
        let Some((_, error)) = all.first_key_value() else { return String::new() };
        let numbers: Vec<_> = all.keys().map(ToString::to_string).collect();
        format!("; not tried: {} ({})", numbers.join(", "), error.detail())
    }
}

fn wrong(passphrases: &[Passphrase], skipped: &str, line_breaks: bool) -> Error {
    let detail = match passphrases {
        [_] => "the passphrase or key file opens none of its key slots",
        _ => "none of the passphrases or key files opens a key slot of it",
    };
    // Editors and `echo` end a file in this way.
    let line_break = match line_breaks {
        true => " (a file ends with a line break, which is a part of its passphrase)",
        false => "",
    };
    let detail = format!("{detail}{line_break}{skipped}");
    Error::new(ErrorKind::KeyRequired, "open", detail)
}
