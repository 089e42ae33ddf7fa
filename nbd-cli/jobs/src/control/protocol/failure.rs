//! The failures.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The kind of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request is malformed or contradictory.
    InvalidRequest,
    /// There is no export or bitmap of that name.
    NotFound,
    /// The name is in use.
    AlreadyExists,
    /// Clients, a checkpoint or another program use the object.
    InUse,
    /// Any other failure.
    Failed,
}

/// The failure of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Kind of the failure.
    pub kind: ErrorKind,
    /// A human-readable sentence.
    pub message: String,
}

impl Failure {
    /// Creates a failure; `message` is the whole sentence.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<imgfmt::Error> for Failure {
    fn from(error: imgfmt::Error) -> Self {
        Self::from(&error)
    }
}

impl From<&imgfmt::Error> for Failure {
    fn from(error: &imgfmt::Error) -> Self {
        let kind = match error.kind() {
            imgfmt::ErrorKind::NotFound => ErrorKind::NotFound,
            imgfmt::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            imgfmt::ErrorKind::InvalidInput => ErrorKind::InvalidRequest,
            imgfmt::ErrorKind::Busy => ErrorKind::InUse,
            _ => ErrorKind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}
