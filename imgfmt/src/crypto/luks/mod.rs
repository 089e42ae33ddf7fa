//! LUKS, versions 1 and 2: opens an encrypted volume by a passphrase.
//!
//! The layout follows the LUKS1 On-Disk Format Specification 1.2.3 and the LUKS2 On-Disk Format
//! Specification 1.1. A header is untrusted: every offset, length and cost in it has a bound. New
//! headers are of version 1.

mod field;
mod header;
mod json;
mod keys;
mod keyslots;
mod new;
mod slot;
mod v1;
mod v2;

use std::sync::Arc;

use self::field::{read_error, read_exact};
use self::header::Header;
pub(crate) use self::keys::change_keys;
pub(crate) use self::new::new_header;
#[cfg(feature = "test-util")]
pub use self::v2::seal;
use super::cipher::SectorCipher;
use super::error::{invalid, unsupported};
use crate::bytes::u16_at;
use crate::error::{ErrorKind, Result};
use crate::luks::{MAGIC, SECTOR};
use crate::passphrase::Passphrase;
use crate::storage::Storage;

/// An encrypted part of a storage, with its key.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(in crate::crypto) cipher: Arc<SectorCipher>,
    /// Where its data begins in the storage, in bytes.
    pub(in crate::crypto) start: u64,
    /// The length of its data in bytes; without one it ends where the storage does.
    pub(in crate::crypto) size: Option<u64>,
    /// The size in bytes of what is encrypted as one.
    pub(in crate::crypto) sector_size: u64,
    /// The number of its first sector for initialisation vectors, in units of 512 bytes.
    pub(in crate::crypto) first_number: u64,
}

/// Opens the volume whose header is at the start of a storage, by the first passphrase that opens a
/// slot of it. Takes as long as the header wants, up to minutes.
pub(crate) fn unlock(storage: &dyn Storage, passphrases: &[Passphrase]) -> Result<Volume> {
    let header = read(storage, 0)?;
    let Header { payload: start, size, sector_size, first_number, .. } = header;
    let length = storage.len().map_err(read_error)?;
    // Before the expensive step.
    if start == 0 {
        return Err(unsupported("it is a detached LUKS header, and its data is in another file"));
    }
    if start.saturating_add(size.unwrap_or(0)) > length {
        return Err(invalid(format!(
            "its encrypted data begins or ends past the end of the file of {length} bytes"
        )));
    }
    let cipher = Arc::new(header.find_key(storage, 0, passphrases)?);
    Ok(Volume { cipher, start, size, sector_size, first_number })
}

/// Opens the volume that is the data of a qcow2 image, whose header is `length` bytes at `base` of
/// the file. The number of a sector is its place in the file, and any sector may be one of the
/// data.
pub(crate) fn unlock_within(
    storage: &dyn Storage,
    (base, length): (u64, u64),
    passphrases: &[Passphrase],
) -> Result<Volume> {
    let header = read(storage, base)?;
    if header.version != 1 {
        return Err(unsupported("its data is encrypted with LUKS, but not with version 1"));
    }
    if header.slots.iter().any(|slot| slot.end() > length) {
        return Err(invalid("a key slot of its LUKS header lies past the end of that header"));
    }
    let cipher = Arc::new(header.find_key(storage, base, passphrases)?);
    Ok(Volume { cipher, start: 0, size: None, sector_size: SECTOR, first_number: 0 })
}

/// Reads the header at `base`.
fn read(storage: &dyn Storage, base: u64) -> Result<Header> {
    let mut start = [0; 8];
    read_exact(storage, base, 0, &mut start)?;
    let is_primary = start.starts_with(MAGIC);
    match u16_at(&start, 6) {
        1 if is_primary => v1::read(storage, base),
        2 if is_primary => v2::read(storage, base),
        // Its first header may be lost.
        _ if !is_primary => v2::read(storage, base).map_err(|error| match error.kind() {
            ErrorKind::InvalidFormat => invalid("it does not begin with a LUKS header"),
            _ => error,
        }),
        version => Err(invalid(format!("version {version} of LUKS is not known here"))),
    }
}
