//! The error of opening an image for export.

use std::fmt;

use imgfmt::ErrorKind;

use crate::error::JobError;

/// The reason why an image cannot be exported.
#[derive(Debug)]
#[non_exhaustive]
pub enum OpenError {
    /// The image engine refuses it.
    Image(imgfmt::Error),
    /// Any other reason.
    Other(JobError),
}

impl OpenError {
    /// Returns whether another process uses the image.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, Self::Image(error) if error.kind() == ErrorKind::Busy)
    }

    /// Returns whether the image could be opened read-only.
    pub fn may_be_readable(&self) -> bool {
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

impl std::error::Error for OpenError {}

impl From<JobError> for OpenError {
    fn from(error: JobError) -> Self {
        Self::Other(error)
    }
}
