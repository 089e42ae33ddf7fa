//! Errors of jobs.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::text::without_error_numbers;

/// The side at fault for a [`JobError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobErrorKind {
    /// The source cannot be opened, reached or read.
    Source,
    /// The destination cannot be created, reached, written to or completed.
    Destination,
    /// The reader of standard output has closed the pipe, as `head` does: what it read is correct,
    /// and the rest was not written.
    OutputClosed,
    /// The base of a new backup cannot be opened, or is or may be the wrong one.
    Base,
    /// The control socket of a server cannot be reached, or the server refuses a request.
    ControlSocket,
    /// A dirty bitmap lacks changes, or cannot be changed.
    Bitmap,
    /// A kernel device cannot be attached, kept or detached.
    Device,
    /// A file of certificates or keys cannot be read, made or replaced.
    Credentials,
    /// Verification found a difference.
    Mismatch,
    /// The job was cancelled.
    Interrupted,
    /// The options contradict each other or are out of range.
    InvalidArgument,
    /// The process itself: a task panicked or was cancelled.
    Internal,
}

/// The failure of a job: one sentence that names the file or server, the operation and the remedy.
/// If the remedy is an option, it has its name in `nbd-cli`.
#[derive(Debug)]
pub struct JobError {
    kind: JobErrorKind,
    message: String,
    could_be_shared: bool,
    opening: Option<Box<Opening>>,
}

/// What could not be opened, and why.
#[derive(Debug)]
struct Opening {
    name: PathBuf,
    cause: String,
}

impl JobError {
    /// How a key is given; the end of an error about an encrypted image.
    pub const KEY_ADVICE: &str = "give the file with its passphrase with --key-file";

    /// Creates an error; `message` is the whole sentence.
    pub fn new(kind: JobErrorKind, message: impl Into<String>) -> Self {
        let message = without_error_numbers(message.into());
        Self { kind, message, could_be_shared: false, opening: None }
    }

    /// Converts an error of an image or of a file.
    #[allow(clippy::needless_pass_by_value)] // For map_err.
    pub fn image(kind: JobErrorKind, error: imgfmt::Error) -> Self {
        Self::advised(kind, &error, "")
    }

    /// Converts an error of an image, with advice at its end.
    fn advised(kind: JobErrorKind, error: &imgfmt::Error, advice: &str) -> Self {
        let opening = error.path().and_then(|name| {
            let cause = error.cause_of_opening(name)? + advice;
            Some(Box::new(Opening { name: name.to_owned(), cause }))
        });
        let could_be_shared = error.could_be_shared();
        Self { could_be_shared, opening, ..Self::new(kind, format!("{error}{advice}")) }
    }

    /// Converts an error of opening an image, and adds the option that would allow it.
    pub fn opening(kind: JobErrorKind, error: imgfmt::Error) -> Self {
        Self::opening_with(kind, error, "--format raw")
    }

    /// Like [`opening`](Self::opening), where another option declares the image to be raw.
    pub fn opening_with(kind: JobErrorKind, mut error: imgfmt::Error, raw_option: &str) -> Self {
        let advice = match (error.kind(), error.found_format()) {
            (imgfmt::ErrorKind::PolicyDenied, _) => match error.remove_policy_advice() {
                true => "; add --trust-image if you trust its maker".to_owned(),
                false => " (with --trust-image, if you trust its maker)".to_owned(),
            },
            (imgfmt::ErrorKind::KeyRequired, _) => format!("; {}", Self::KEY_ADVICE),
            (_, Some(_)) => format!(" ({raw_option})"),
            _ => String::new(),
        };
        Self::advised(kind, &error, &advice)
    }

    /// The error of an image that cannot be opened because of the caller's options.
    pub(crate) fn not_opened(name: String, shown: &dyn fmt::Display, cause: String) -> Self {
        let message = format!("cannot open {shown}: {cause}");
        let opening = Some(Box::new(Opening { name: name.into(), cause }));
        Self { opening, ..Self::invalid(message) }
    }

    /// Returns why the file or export of this name could not be opened, if that is the error: the
    /// text of the error after its name.
    pub fn cause_of_opening(&self, name: &str) -> Option<&str> {
        let opening = self.opening.as_ref().filter(|opening| opening.name == Path::new(name))?;
        Some(&opening.cause)
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

    /// A task panicked or was cancelled.
    pub fn given_up(what: &str, error: &tokio::task::JoinError) -> Self {
        Self::new(JobErrorKind::Internal, format!("a {what} was cancelled: {error}"))
    }

    /// Replaces the sentence of the error.
    #[must_use]
    pub fn in_words(&self, message: String) -> Self {
        Self::new(self.kind, message)
    }

    /// Adds the option that allows reading a file while others write to it, if that would help.
    #[must_use]
    pub(crate) fn advise_sharing(self) -> Self {
        match self.could_be_shared {
            true => self.in_words(format!("{self}, or add -U (--force-share) to read it anyway")),
            false => self,
        }
    }

    /// Returns the side at fault.
    pub fn kind(&self) -> JobErrorKind {
        self.kind
    }

    /// Returns whether a file could not be read because another program writes to it, and could be
    /// read with [`Locking::Shared`](imgfmt::Locking::Shared).
    pub fn could_be_shared(&self) -> bool {
        self.could_be_shared
    }
}

impl From<imgfmt::jobs::JobError> for JobError {
    fn from(error: imgfmt::jobs::JobError) -> Self {
        use imgfmt::jobs::JobErrorKind as Kind;
        let kind = match error.kind() {
            Kind::Source => JobErrorKind::Source,
            Kind::Destination | Kind::DoesNotFit => JobErrorKind::Destination,
            Kind::Interrupted => JobErrorKind::Interrupted,
            Kind::InvalidArgument => JobErrorKind::InvalidArgument,
            _ => JobErrorKind::Internal,
        };
        match error.into_image_error() {
            Ok(error) => Self::image(kind, error),
            Err(error) => Self::new(kind, error.to_string()),
        }
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for JobError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_that_of_the_file_that_could_not_be_opened() {
        let error = |kind, operation| {
            imgfmt::Error::new(kind, operation, "why \u{1b}").with_path("cannot open 'a'")
        };
        let kind = JobErrorKind::Source;
        let missing = JobError::image(kind, error(imgfmt::ErrorKind::NotFound, "open"));
        assert_eq!(missing.to_string(), r"cannot open 'cannot open 'a'': why \u{1b}");
        assert_eq!(missing.cause_of_opening("cannot open 'a'"), Some(r"why \u{1b}"));
        assert_eq!(missing.cause_of_opening("a"), None);
        let locked = JobError::opening(kind, error(imgfmt::ErrorKind::KeyRequired, "open"));
        let cause = locked.cause_of_opening("cannot open 'a'").expect("it was to be opened");
        assert!(cause.ends_with(JobError::KEY_ADVICE) && locked.to_string().ends_with(cause));
        let read = JobError::image(kind, error(imgfmt::ErrorKind::Io, "read from"));
        assert_eq!(read.cause_of_opening("cannot open 'a'"), None);
        let below = JobError::image(kind, error(imgfmt::ErrorKind::Corrupt, "open").at(7));
        assert_eq!(below.cause_of_opening("cannot open 'a'"), None);
    }
}
