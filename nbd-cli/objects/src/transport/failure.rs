//! Errors whose text is shown to the user.

use object_store::client::{HttpError, HttpErrorKind};

/// Creates an error.
pub(super) fn failed(kind: HttpErrorKind, why: impl Into<String>) -> HttpError {
    HttpError::new(kind, Failure(why.into()))
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failure(String);
