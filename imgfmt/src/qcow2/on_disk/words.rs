//! Tables of big-endian words, and the errors of unreadable or invalid metadata.

use crate::bytes::u64_at;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Storage, TryRead};
use crate::units::HostOffset;

/// Up to this many bytes are read without an allocation.
const SHORT: usize = 4 << 10;

/// Reads a table of 64-bit words.
pub(in crate::qcow2) fn read_words(
    storage: &dyn Storage,
    offset: HostOffset,
    count: usize,
) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    let read = storage.read_at(offset, &mut bytes).map_err(read_error)?;
    // A table may end in the middle of the file's last cluster: the rest is zero.
    bytes[read..].fill(0);
    Ok(bytes.chunks_exact(8).map(|word| u64_at(word, 0)).collect())
}

/// Reads a table of 64-bit words if that needs no waiting for a medium and succeeds.
pub(in crate::qcow2) fn try_read_words(
    storage: &dyn Storage,
    offset: HostOffset,
    count: usize,
) -> Option<Vec<u64>> {
    // Slices of large tables are short, and read often.
    let mut short = [0; SHORT];
    let mut long = Vec::new();
    let bytes = match short.get_mut(..count * 8) {
        Some(bytes) => bytes,
        None => {
            long.resize(count * 8, 0);
            &mut long
        }
    };
    match storage.try_read_at(offset, bytes) {
        Ok(TryRead::Complete) => Some(bytes.chunks_exact(8).map(|word| u64_at(word, 0)).collect()),
        _ => None,
    }
}

pub(in crate::qcow2) fn words_to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// The error of invalid contents.
pub(crate) fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidFormat, "open", detail)
}

/// The error of an unknown feature.
pub(crate) fn unsupported(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, "open", detail)
}

/// The error of a failed read.
pub(crate) fn read_error(error: std::io::Error) -> Error {
    Error::from_io("read the metadata of", error)
}
