//! Why a job failed.

use std::fmt;

use crate::text::without_error_numbers;

/// Whose fault a [`JobError`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobErrorKind {
    /// The source cannot be opened, reached or read.
    Source,
    /// The destination cannot be made, reached, written to or completed.
    Destination,
    /// The backup before a new one cannot be opened, or is or may be the wrong one.
    Base,
    /// The control socket of a server cannot be reached, or the server refuses a request.
    ControlSocket,
    /// Both sides were read again and differ.
    Mismatch,
    /// The job was cancelled.
    Interrupted,
    /// What was asked for contradicts itself or is out of range.
    InvalidArgument,
    /// The process itself: a task was given up.
    Internal,
}

/// Why a job failed: one sentence that names the file or server, what was tried and what to do. Where the
/// remedy is an option, it has the name that it has in `nbd-cli`.
#[derive(Debug)]
pub struct JobError {
    kind: JobErrorKind,
    message: String,
    could_be_shared: bool,
}

impl JobError {
    /// An error; `message` is the whole sentence.
    pub fn new(kind: JobErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: without_error_numbers(message.into()), could_be_shared: false }
    }

    /// An error of an image or of a file.
    #[allow(clippy::needless_pass_by_value)] // For map_err.
    pub fn image(kind: JobErrorKind, error: imgfmt::Error) -> Self {
        let could_be_shared = error.could_be_shared();
        Self { could_be_shared, ..Self::new(kind, error.to_string()) }
    }

    /// An error of an image that was to be opened, with the option that would allow what was refused.
    pub fn opening(kind: JobErrorKind, error: imgfmt::Error) -> Self {
        Self::opening_with(kind, error, "--format raw")
    }

    /// As [`opening`](Self::opening), where another option says that the image is raw.
    pub fn opening_with(kind: JobErrorKind, error: imgfmt::Error, raw_option: &str) -> Self {
        match (error.kind(), error.found_format()) {
            (imgfmt::ErrorKind::PolicyDenied, _) => {
                Self::new(kind, format!("{error} (with --trust-image, if you trust its maker)"))
            }
            (_, Some(_)) => Self::new(kind, format!("{error} ({raw_option})")),
            _ => Self::image(kind, error),
        }
    }

    /// The source is at fault.
    pub fn source(message: impl Into<String>) -> Self {
        Self::new(JobErrorKind::Source, message)
    }

    /// The destination is at fault.
    pub fn destination(message: impl Into<String>) -> Self {
        Self::new(JobErrorKind::Destination, message)
    }

    /// The caller is at fault.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(JobErrorKind::InvalidArgument, message)
    }

    /// A task has panicked or was given up.
    pub fn given_up(what: &str, error: &tokio::task::JoinError) -> Self {
        Self::new(JobErrorKind::Internal, format!("a {what} was given up: {error}"))
    }

    /// The same error in another sentence.
    #[must_use]
    pub fn in_words(&self, message: String) -> Self {
        Self::new(self.kind, message)
    }

    /// The same error, with the option that would allow to read a file while others write to it, if that
    /// would help.
    #[must_use]
    pub(crate) fn advise_sharing(self) -> Self {
        match self.could_be_shared {
            true => {
                self.in_words(format!("{self}, or add -U (--force-share) to read it all the same"))
            }
            false => self,
        }
    }

    /// Whose fault it is.
    pub fn kind(&self) -> JobErrorKind {
        self.kind
    }

    /// Whether a file could not be read because another program writes to it, and could be read with
    /// [`Locking::Shared`](imgfmt::Locking::Shared).
    pub fn could_be_shared(&self) -> bool {
        self.could_be_shared
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for JobError {}
