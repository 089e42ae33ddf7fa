//! An image with the files that it names: its backing chain and its data file. What concerns the
//! header of one file alone is here.

mod below;
mod check;
mod describe;
mod new_backing;
mod open;

use std::ffi::OsStr;
use std::path::Path;

pub(crate) use self::check::check_storage;
pub(crate) use self::describe::{inspect, inspect_chain};
pub(crate) use self::new_backing::check_new_backing;
use self::open::format_of;
pub(crate) use self::open::{open, open_named};
use crate::access::Access;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::options::OpenOptions;
use crate::qcow2;
use crate::storage::Storage;

/// Changes the name of the backing file in one file's header.
pub(crate) fn change_backing(
    path: &Path,
    options: &OpenOptions,
    backing: Option<(&OsStr, Format)>,
) -> Result<()> {
    options.refuse_part("change the backing file of")?;
    if let Some((name, format)) = backing {
        check_new_backing(path, options, name, format)?;
    }
    let storage = options.open_file(path, Access::ReadWrite)?;
    match format_of(&storage, Some(path), options)? {
        Format::Qcow2 => qcow2::change_backing(&storage, backing, qcow2::Use::Closed),
        format => {
            let detail = match format {
                Format::Raw => "a raw image cannot have a backing file",
                Format::Luks => "an encrypted volume cannot have a backing file",
                _ => "only that of a qcow2 image can be changed",
            };
            Err(Error::new(ErrorKind::Unsupported, "change the backing file of", detail))
        }
    }
}

/// Refuses to amend images of other formats than qcow2.
pub(crate) fn refuse_to_amend(storage: &dyn Storage, options: &OpenOptions) -> Result<()> {
    match format_of(storage, None, options)? {
        Format::Qcow2 => Ok(()),
        _ => {
            let detail = "only qcow2 images have a header that can be amended";
            Err(Error::new(ErrorKind::Unsupported, "amend", detail))
        }
    }
}

/// Where the LUKS header of an image is, and the number of bytes that it may have.
pub(crate) fn luks_place(storage: &dyn Storage, options: &OpenOptions) -> Result<(u64, u64)> {
    let place = match format_of(storage, None, options)? {
        Format::Qcow2 => qcow2::luks_place(storage)?,
        Format::Luks => {
            let length =
                storage.len().map_err(|error| Error::from_io("find the size of", error))?;
            Some((0, length))
        }
        _ => None,
    };
    place.ok_or_else(|| {
        let detail = "it is not encrypted with LUKS, so it has no key slots";
        Error::new(ErrorKind::Unsupported, "change the keys of", detail)
    })
}
