//! Reads parts of headers.

use crate::crypto::error::invalid;
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::units::HostOffset;

/// The second header of version 2.
pub(super) const MAGIC_SECONDARY: &[u8] = b"SKUL\xba\xbe";

/// Reads a part of a header.
pub(super) fn read_exact(
    storage: &dyn Storage,
    base: u64,
    offset: u64,
    buffer: &mut [u8],
) -> Result<()> {
    let place = base.checked_add(offset).map(HostOffset::new);
    let place = place.ok_or_else(|| invalid("its LUKS header lies past the end of the file"))?;
    storage.read_exact_at(place, buffer).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => invalid("its LUKS header is cut off"),
        _ => read_error(error),
    })
}

pub(super) fn read_error(error: std::io::Error) -> Error {
    Error::from_io("read the header of", error)
}

/// A text that ends at its first zero byte, or at the end of its field.
pub(super) fn text(field: &[u8]) -> Result<String> {
    let bytes = field.split(|byte| *byte == 0).next().unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(invalid("a name in its LUKS header is not text")),
    }
}
