//! Errors of encryption.

use openssl::error::ErrorStack;

use crate::error::{Error, ErrorKind};

pub(super) fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidFormat, "open", detail)
}

pub(super) fn unsupported(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, "open", detail)
}

/// A failure of the cryptographic library, which has no secrets in its text.
pub(super) fn library(error: &ErrorStack) -> Error {
    let reason = error.errors().first().and_then(|error| error.reason());
    let reason = reason.unwrap_or("it does not say why");
    unsupported(format!("the cryptographic library refused the encryption of it: {reason}"))
}
