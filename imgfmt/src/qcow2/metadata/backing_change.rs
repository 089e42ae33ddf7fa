//! Changing the name of the backing file in the header.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use crate::bytes::u32_at;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::{Header, MAGIC, V2_LENGTH, autoclear, field, incompatible};
use crate::qcow2::on_disk::words::read_error;
use crate::qcow2::purpose::Purpose;
use crate::storage::{Durability, Storage};
use crate::units::HostOffset;

const NAME_BYTES_MAX: usize = 1023;
const BACKING_FILE_OFFSET: usize = 8;
const BACKING_FILE_SIZE: usize = 16;

/// Rewrites the header with another backing file's name and format, or without any. All other
/// extensions, known or not, stay as they are.
pub(crate) fn change_backing(
    storage: &dyn Storage,
    backing: Option<(&OsStr, Format)>,
) -> Result<()> {
    let header = Header::read(storage, Purpose::Use)?;
    header.refuse_encryption()?;
    if header.incompatible & incompatible::CORRUPT != 0 {
        let detail = "it is marked as damaged; check and repair it first";
        return Err(Error::new(ErrorKind::Corrupt, "change", detail));
    }
    if backing.is_some() && header.autoclear & autoclear::RAW_DATA_FILE != 0 {
        return Err(invalid("an image with a raw data file cannot have a backing file"));
    }
    if let Some((_, format)) = backing
        && !format.is_supported()
    {
        let detail = format!("a {} image cannot be a backing file", format.description());
        return Err(Error::new(ErrorKind::Unsupported, "change the backing file of", detail));
    }
    let mut first = vec![0; header.geometry.cluster_size() as usize];
    let read = storage.read_at(HostOffset::new(0), &mut first).map_err(read_error)?;
    debug_assert!(first[..read].starts_with(&MAGIC));
    let content = rewritten(&header, &first, backing)?;
    storage
        .write_at(HostOffset::new(0), &content, Durability::Cached)
        .and_then(|()| storage.sync())
        .map_err(|error| Error::from_io("write the header of", error))
}

/// The first cluster as it is to be.
fn rewritten(header: &Header, first: &[u8], backing: Option<(&OsStr, Format)>) -> Result<Vec<u8>> {
    let is_v3 = header.version >= 3;
    let header_length = if is_v3 { u32_at(first, 100) as usize } else { V2_LENGTH as usize };
    let mut content = first[..header_length].to_vec();
    if is_v3 {
        // We write, and do not keep up to date what we do not know.
        let at = field::AUTOCLEAR as usize;
        content[at..at + 8].copy_from_slice(&header.kept_autoclear().to_be_bytes());
    }
    let old_name = crate::bytes::u64_at(first, BACKING_FILE_OFFSET) as usize;
    let area_end = if old_name == 0 { first.len() } else { old_name.min(first.len()) };
    let area = first.get(header_length..area_end).unwrap_or_default();
    content.extend(extension::without(area, extension::BACKING_FORMAT)?);
    let (mut offset, mut length) = (0, 0);
    if let Some((name, format)) = backing {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(invalid("the backing file's name has 1 to 1023 bytes"));
        }
        extension::push(&mut content, extension::BACKING_FORMAT, format.name().as_bytes());
        content.extend([0; 8]);
        (offset, length) = (content.len() as u64, name.len() as u32);
        content.extend(name.as_bytes());
    } else {
        content.extend([0; 8]);
    }
    if content.len() > first.len() {
        return Err(invalid("the backing file's name does not fit into the image's header"));
    }
    content[BACKING_FILE_OFFSET..][..8].copy_from_slice(&offset.to_be_bytes());
    content[BACKING_FILE_SIZE..][..4].copy_from_slice(&length.to_be_bytes());
    content.resize(first.len(), 0);
    Ok(content)
}

fn invalid(detail: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, "change the backing file of", detail)
}
