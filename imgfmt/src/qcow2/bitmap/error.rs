//! Errors about bitmaps that are missing or unreliable.

use crate::error::{Error, ErrorKind};

pub(super) const CHANGE: &str = "change the bitmaps of";

/// The error of naming a bitmap that does not exist.
pub(crate) fn no_bitmap(name: &str) -> Error {
    let detail = format!("the image has no bitmap '{}'", name.escape_debug());
    Error::new(ErrorKind::NotFound, "use a bitmap of", detail)
}

/// The error of using unreliable bits.
pub(super) fn not_reliable(name: &str, detail: &str) -> Error {
    let detail = format!(
        "the bitmap '{}' cannot be relied on: {detail}; remove it, or repair it so that everything \
         counts as dirty",
        name.escape_debug()
    );
    Error::new(ErrorKind::Corrupt, "use a bitmap of", detail)
}
