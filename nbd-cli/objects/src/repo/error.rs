//! Errors of repositories.

use std::fmt;

use crate::shown::printable;

/// What kind of error it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RepositoryErrorKind {
    /// There is no repository, or no such backup in it.
    NotFound,
    /// There is a repository already.
    Exists,
    /// The request makes no sense, or this version cannot carry it out.
    Invalid,
    /// An object is missing, or holds something else than was written.
    Damaged,
    /// The passphrase is missing or wrong.
    Key,
    /// Another backup of the name was made, so the bitmap may not belong to the last one.
    Overtaken,
    /// Another process ended the backup, or removed what was read.
    Fenced,
    /// The store failed.
    Store,
}

/// An error of a repository: one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryError {
    kind: RepositoryErrorKind,
    message: String,
}

/// The result of an operation of a repository.
pub type Result<T> = std::result::Result<T, RepositoryError>;

impl RepositoryError {
    /// Names in `message` may be those of anyone who can write to the store.
    pub(crate) fn new(kind: RepositoryErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: printable(&message.into()).collect() }
    }

    pub(crate) fn damaged(message: impl Into<String>) -> Self {
        Self::new(RepositoryErrorKind::Damaged, message)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(RepositoryErrorKind::Invalid, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(RepositoryErrorKind::NotFound, message)
    }

    /// Returns what kind of error it is.
    pub fn kind(&self) -> RepositoryErrorKind {
        self.kind
    }
}

impl fmt::Display for RepositoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for RepositoryError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_a_repository_control_no_terminal() {
        let error = RepositoryError::not_found("it has backups of: a\x1b[2J\r\nb\u{202e}c");
        assert_eq!(error.to_string(), "it has backups of: a [2J  b c");
    }
}
