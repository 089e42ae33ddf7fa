//! The old encryption of qcow2 images: AES-128 in the mode CBC. The key is the passphrase, cut off
//! or filled with zeroes to 16 bytes, and vectors are numbers of sectors of the disk, not of the
//! file. Nothing shows whether a passphrase is the right one. It is read, and never written.

use std::sync::Arc;

use zeroize::Zeroizing;

use super::cipher::SectorCipher;
use super::encrypted::Encrypted;
use super::luks::Volume;
use crate::error::{Error, ErrorKind, Result};
use crate::luks::SECTOR;
use crate::passphrase::Passphrase;
use crate::storage::Storage;
use crate::units::{GuestOffset, HostOffset};

const KEY_LENGTH: usize = 16;

/// The key of an image.
#[derive(Clone, Debug)]
pub(crate) struct OldAes(Arc<SectorCipher>);

impl OldAes {
    pub(crate) fn new(passphrases: &[Passphrase]) -> Result<Self> {
        let [passphrase] = passphrases else {
            let detail = match passphrases {
                [] => "it is encrypted, and no passphrase was given",
                _ => {
                    "it has the old AES of qcow2, which does not show which of several passphrases is \
                     the right one; give only that one"
                }
            };
            return Err(Error::new(ErrorKind::KeyRequired, "open", detail));
        };
        let bytes = passphrase.bytes()?;
        let mut key = Zeroizing::new(vec![0; KEY_LENGTH]);
        key.iter_mut().zip(bytes.iter()).for_each(|(key, byte)| *key = *byte);
        Ok(Self(Arc::new(SectorCipher::new("aes", "cbc-plain64", key)?)))
    }

    /// A file in which the bytes at `host` are those of the disk at `guest`, and so on from there.
    pub(crate) fn decrypted(
        &self,
        file: Arc<dyn Storage>,
        host: HostOffset,
        guest: GuestOffset,
    ) -> Encrypted {
        let first_number = (guest.bytes() / SECTOR).wrapping_sub(host.bytes() / SECTOR);
        let cipher = Arc::clone(&self.0);
        let volume = Volume { cipher, start: 0, size: None, sector_size: SECTOR, first_number };
        Encrypted::new(file, volume)
    }
}
