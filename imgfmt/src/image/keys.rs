//! Changes the passphrases of encrypted images.

use std::path::Path;
use std::sync::Arc;

use super::Image;
use crate::access::Access;
use crate::backing_file::BackingFile;
use crate::chain;
use crate::error::{Error, ErrorKind, Result};
use crate::options::OpenOptions;
use crate::passphrase::{KeyChange, KeysChanged};
use crate::qcow2::{self, Repair};
use crate::storage::Storage;

const OPERATION: &str = "change the keys of";

impl Image {
    /// Changes the passphrases of a LUKS volume of version 1, or of a qcow2 image that is encrypted
    /// with LUKS. The key of the disk does not change: a person who has it can still decrypt the
    /// disk. The image must not be in use. Takes as long as deriving several keys.
    ///
    /// A new passphrase is durable, and was read back, before an old one is removed, and a removed
    /// one is overwritten. If the change is interrupted at any moment, the passphrases that stay
    /// open the image, and so does the old or the new one of a replacement, or both.
    ///
    /// # Errors
    ///
    /// `KeyRequired` if a passphrase is missing or opens nothing; `InvalidInput` if nothing would
    /// open the image afterwards; `AlreadyExists` or `NoSpace` if the key slot, or every one, is in
    /// use; `Unsupported` for LUKS version 2 and for images that are not encrypted; `Corrupt` if a
    /// check of a qcow2 image finds damage; otherwise as [`open`](Self::open).
    pub fn change_keys(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        change: &KeyChange,
    ) -> Result<KeysChanged> {
        let path = path.as_ref();
        let file = options.open_file(path, Access::ReadWrite);
        file.and_then(|file| change_keys(&(Arc::new(file) as _), Some(path), options, change))
            .map_err(|error| error.with_path(path))
    }

    /// Changes the passphrases of an image in any storage, like [`change_keys`](Self::change_keys).
    ///
    /// # Errors
    ///
    /// As [`change_keys`](Self::change_keys).
    pub fn change_keys_of_storage(
        storage: &Arc<dyn Storage>,
        options: &OpenOptions,
        change: &KeyChange,
    ) -> Result<KeysChanged> {
        change_keys(storage, None, options, change)
    }
}

fn change_keys(
    storage: &Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
    change: &KeyChange,
) -> Result<KeysChanged> {
    options.refuse_part("change the keys of")?;
    let options = &options.clone().access(Access::ReadWrite).backing(BackingFile::Ignored);
    let place = chain::luks_place(&**storage, options)?;
    let info = chain::inspect(Arc::clone(storage), path, options)?;
    let Some(qcow2) = info.qcow2 else {
        return change_in_header(&**storage, place, options, change);
    };
    if !qcow2.bitmaps.is_empty() {
        // A crash has left bits of bitmaps beside the image, which a change of the file
        // invalidates.
        Image::open_named(Arc::clone(storage), path, options)?.close()?;
    }
    refuse_damaged(storage, path, options)?;
    let changed = change_in_header(&**storage, place, options, change)?;
    // The disk is what it was, though the file is not.
    match qcow2.backup.filter(|backup| backup.is_unchanged) {
        Some(backup) => qcow2::seal(&**storage, &backup.identity).map(|()| changed),
        None => Ok(changed),
    }
}

/// Refuses an image in which the place of a key slot might be that of something else as well.
fn refuse_damaged(
    storage: &Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
) -> Result<()> {
    let report = chain::check_storage(Arc::clone(storage), path, options, Repair::None)?;
    match report.corruptions {
        0 => Ok(()),
        _ => {
            let detail = "its metadata is damaged, so that a key might be written over data; repair it \
                          first with 'nbd-cli image check --repair all'";
            Err(Error::new(ErrorKind::Corrupt, OPERATION, detail))
        }
    }
}

#[cfg(feature = "encryption")]
fn change_in_header(
    storage: &dyn Storage,
    place: (u64, u64),
    options: &OpenOptions,
    change: &KeyChange,
) -> Result<KeysChanged> {
    crate::crypto::luks::change_keys(storage, place, &options.passphrases, change)
}

#[cfg(not(feature = "encryption"))]
fn change_in_header(
    _: &dyn Storage,
    _: (u64, u64),
    _: &OpenOptions,
    _: &KeyChange,
) -> Result<KeysChanged> {
    let detail = "this program was built without encryption";
    Err(Error::new(ErrorKind::Unsupported, OPERATION, detail))
}
