//! Errors of jobs.

use std::fmt;

use crate::error::Error;

/// The side at fault for a [`JobError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum JobErrorKind {
    /// An image that is read.
    Source,
    /// The image that is written.
    Destination,
    /// The destination is too small, or cannot grow enough. Nothing was written.
    DoesNotFit,
    /// The job was cancelled.
    Interrupted,
    /// The options contradict each other, are out of range, or are not possible with these images.
    /// Nothing was written.
    InvalidArgument,
    /// The process itself: a thread panicked.
    Internal,
}

/// The failure of a job: one sentence that names the file, the operation and the remedy.
#[derive(Debug)]
pub struct JobError {
    kind: JobErrorKind,
    cause: Cause,
}

#[derive(Debug)]
enum Cause {
    Image(Error),
    Words(String),
}

impl JobError {
    /// Creates an error; `message` is the whole sentence.
    pub fn new(kind: JobErrorKind, message: impl Into<String>) -> Self {
        Self { kind, cause: Cause::Words(message.into()) }
    }

    /// Converts an error of an image.
    pub fn image(kind: JobErrorKind, error: Error) -> Self {
        Self { kind, cause: Cause::Image(error) }
    }

    /// An image that is read has failed.
    pub(crate) fn source(error: Error) -> Self {
        Self::image(JobErrorKind::Source, error)
    }

    /// The image that is written has failed.
    pub(crate) fn destination(error: Error) -> Self {
        Self::image(JobErrorKind::Destination, error)
    }

    /// The request is not possible.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(JobErrorKind::InvalidArgument, message)
    }

    /// Returns the side at fault.
    pub fn kind(&self) -> JobErrorKind {
        self.kind
    }

    /// Returns the error of the failed image, if there is one.
    pub fn image_error(&self) -> Option<&Error> {
        match &self.cause {
            Cause::Image(error) => Some(error),
            Cause::Words(_) => None,
        }
    }

    /// Like [`image_error`](Self::image_error), by value.
    ///
    /// # Errors
    ///
    /// This error itself, if it is not that of an image.
    pub fn into_image_error(self) -> Result<Error, Self> {
        match self.cause {
            Cause::Image(error) => Ok(error),
            cause @ Cause::Words(_) => Err(Self { cause, ..self }),
        }
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::Image(error) => error.fmt(f),
            Cause::Words(words) => f.write_str(words),
        }
    }
}

impl std::error::Error for JobError {}
