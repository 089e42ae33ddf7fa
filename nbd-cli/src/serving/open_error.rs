//! Why an image cannot be exported.

use std::fmt;

use imgfmt::ErrorKind;

use crate::error::CommandError;

/// The reason why an image cannot be exported.
#[derive(Debug)]
pub(crate) enum OpenError {
    Image(imgfmt::Error),
    Other(CommandError),
}

impl OpenError {
    /// Returns whether another process uses the image.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, Self::Image(error) if error.kind() == ErrorKind::Busy)
    }

    /// Returns whether the image could be opened read-only.
    pub(crate) fn may_be_readable(&self) -> bool {
        match self {
            Self::Image(error) => {
                matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly)
            }
            Self::Other(_) => false,
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(error) => error.fmt(f),
            Self::Other(error) => error.fmt(f),
        }
    }
}

impl From<imgfmt::Error> for OpenError {
    fn from(error: imgfmt::Error) -> Self {
        Self::Image(error)
    }
}

impl From<CommandError> for OpenError {
    fn from(error: CommandError) -> Self {
        Self::Other(error)
    }
}
