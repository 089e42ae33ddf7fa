//! Header extensions: small records after the header.
//!
//! Each has a type (4 bytes), a length (4 bytes) and that many bytes, padded to a multiple of 8.
//! Type 0 ends the list. Version 2 images have them too, from offset 72 on.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use crate::bytes::{u32_at, u64_at};
use crate::error::Result;
use crate::qcow2::on_disk::words::invalid;

pub(crate) const END: u32 = 0;
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
pub(crate) const BITMAPS: u32 = 0x2385_2875;
/// This crate's own: UUID and generation of the sidecar with the bits of bitmaps that are in use.
pub(crate) const SIDECAR: u32 = 0x6469_7274;
/// This crate's own: the backup after which each bitmap began.
pub(crate) const LINEAGE: u32 = 0x6c69_6e65;
/// This crate's own: the identity of the backup that the image is.
pub(crate) const BACKUP: u32 = 0x6263_6b70;
pub(crate) const DATA_FILE_NAME: u32 = 0x4441_5441;
/// Offset and length of the header of the encryption.
pub(crate) const ENCRYPTION_HEADER: u32 = 0x0537_be77;

/// Size of one entry of the feature name table: type, bit, name.
const FEATURE_ENTRY: usize = 48;

/// The extensions this crate understands.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extensions {
    pub(crate) backing_format: Option<String>,
    pub(crate) data_file_name: Option<OsString>,
    /// The bitmaps extension, undecoded.
    pub(crate) bitmaps: Option<Vec<u8>>,
    /// The content of the extension about the sidecar.
    pub(crate) sidecar: Option<Vec<u8>>,
    /// The records of the bitmaps' backups; there are two while one replaces the other.
    pub(crate) lineages: Vec<Vec<u8>>,
    /// The record of the backup that the image is.
    pub(crate) backup: Option<Vec<u8>>,
    /// Offset and length of the header of the encryption, in bytes; unchecked.
    pub(crate) encryption_header: Option<(u64, u64)>,
    feature_names: Vec<u8>,
    /// The offset, from the start of the area, of an end mark with a length that exceeds the area.
    /// It is ignored here; QEMU refuses such an image.
    pub(crate) overlong_end: Option<usize>,
}

impl Extensions {
    /// The name the image itself gives to a feature bit, for messages about unknown ones.
    pub(crate) fn feature_name(&self, kind: u8, bit: u8) -> String {
        let entry =
            self.feature_names.chunks_exact(FEATURE_ENTRY).find(|e| e[0] == kind && e[1] == bit);
        match entry {
            Some(entry) => {
                let name: Vec<u8> = entry[2..].iter().copied().take_while(|b| *b != 0).collect();
                format!("'{}' (bit {bit})", String::from_utf8_lossy(&name).escape_debug())
            }
            None => format!("bit {bit}"),
        }
    }
}

/// Decodes the area between the header and the backing file's name.
pub(crate) fn decode(mut area: &[u8]) -> Result<Extensions> {
    let mut extensions = Extensions::default();
    let area_length = area.len();
    while area.len() >= 8 {
        let kind = u32_at(area, 0);
        let length = u32_at(area, 4) as usize;
        if kind == END {
            let is_overlong = length > area.len() - 8;
            extensions.overlong_end = is_overlong.then_some(area_length - area.len());
            break;
        }
        let Some(content) = area[8..].get(..length) else {
            return Err(invalid(format!("header extension {kind:#x} goes beyond its area")));
        };
        match kind {
            BACKING_FORMAT => extensions.backing_format = Some(text(content)?),
            DATA_FILE_NAME => {
                extensions.data_file_name = Some(OsStr::from_bytes(content).to_owned());
            }
            FEATURE_NAMES => extensions.feature_names = content.to_vec(),
            BITMAPS => extensions.bitmaps = Some(content.to_vec()),
            ENCRYPTION_HEADER => {
                extensions.encryption_header = Some((u64_at(content, 0), u64_at(content, 8)));
            }
            SIDECAR => extensions.sidecar = Some(content.to_vec()),
            LINEAGE => extensions.lineages.push(content.to_vec()),
            BACKUP => extensions.backup = Some(content.to_vec()),
            _ => {}
        }
        area = area.get(8 + length.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(extensions)
}

/// Appends an extension.
pub(crate) fn push(bytes: &mut Vec<u8>, kind: u32, content: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend((content.len() as u32).to_be_bytes());
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// The bytes of the extensions of an area, except those of one kind and the end mark.
pub(crate) fn without(mut area: &[u8], kind: u32) -> Result<Vec<u8>> {
    // Every extension is complete.
    decode(area)?;
    let mut kept = Vec::new();
    while area.len() >= 8 && u32_at(area, 0) != END {
        let length = 8 + (u32_at(area, 4) as usize).next_multiple_of(8);
        let (one, rest) = area.split_at(length.min(area.len()));
        if u32_at(one, 0) != kind {
            kept.extend(one);
            kept.resize(kept.len().next_multiple_of(8), 0);
        }
        area = rest;
    }
    Ok(kept)
}

fn text(content: &[u8]) -> Result<String> {
    match std::str::from_utf8(content) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(invalid("a name in a header extension is not valid UTF-8")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_are_padded_to_eight_bytes() {
        let mut area = Vec::new();
        area.extend(BACKING_FORMAT.to_be_bytes());
        area.extend(3u32.to_be_bytes());
        area.extend(b"raw\0\0\0\0\0");
        area.extend(0x1234_5678u32.to_be_bytes()); // unknown: skipped
        area.extend(8u32.to_be_bytes());
        area.extend([9; 8]);
        area.extend(DATA_FILE_NAME.to_be_bytes());
        area.extend(8u32.to_be_bytes());
        area.extend(b"data.raw");
        let extensions = decode(&area).unwrap();
        assert_eq!(extensions.backing_format.as_deref(), Some("raw"));
        assert_eq!(extensions.data_file_name.as_deref(), Some(OsStr::new("data.raw")));
        assert!(decode(&area[..area.len() - 1]).is_err());
    }
}
