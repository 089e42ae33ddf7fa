//! Errors of the program and the exit codes of its outcomes.

use std::fmt;
use std::io;

use nbd_jobs::text::{readable, without_error_numbers};
use nbd_jobs::{JobError, JobErrorKind};

/// The outcome of a command that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The command succeeded.
    Success,
    /// The queried property of the server is false.
    False,
    /// A specific status: that of the command that was run, or of the result.
    Status(u8),
}

impl Outcome {
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::False => 2,
            Self::Status(status) => status,
        }
    }
}

/// The effect of a [`CommandError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CommandErrorKind {
    /// A failure: reported on standard error, exit code 1.
    Failure,
    /// The reader of a report has closed it: nothing is reported.
    BrokenPipe,
    /// The reader of a copied disk has closed it. Nothing is reported, but the exit code shows that
    /// the copy is incomplete.
    CopyCutShort,
}

/// The failure of a command, as one sentence that names the file or address, the operation and the
/// remedy.
#[derive(Debug)]
pub(crate) struct CommandError {
    kind: CommandErrorKind,
    message: String,
    could_be_shared: bool,
}

impl CommandError {
    /// Creates a failure; `message` is the whole sentence.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        let message = readable(&without_error_numbers(message.into()));
        Self { kind: CommandErrorKind::Failure, message, could_be_shared: false }
    }

    /// Converts an error of writing a report to standard output.
    pub(crate) fn output(error: &io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::BrokenPipe => CommandErrorKind::BrokenPipe,
            _ => CommandErrorKind::Failure,
        };
        let message = format!("cannot write to standard output: {error}");
        let message = without_error_numbers(message);
        Self { kind, message, could_be_shared: false }
    }

    /// Returns whether a file could not be read only because another program has it open for
    /// writing, so that shared reading would help.
    pub(crate) fn could_be_shared(&self) -> bool {
        self.could_be_shared
    }

    pub(crate) fn kind(&self) -> CommandErrorKind {
        self.kind
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<imgfmt::Error> for CommandError {
    fn from(error: imgfmt::Error) -> Self {
        Self { could_be_shared: error.could_be_shared(), ..Self::new(error.to_string()) }
    }
}

impl From<JobError> for CommandError {
    fn from(error: JobError) -> Self {
        let kind = match error.kind() {
            JobErrorKind::OutputClosed => CommandErrorKind::CopyCutShort,
            _ => CommandErrorKind::Failure,
        };
        Self { kind, could_be_shared: error.could_be_shared(), ..Self::new(error.to_string()) }
    }
}

impl From<imgfmt::jobs::JobError> for CommandError {
    fn from(error: imgfmt::jobs::JobError) -> Self {
        match error.into_image_error() {
            Ok(error) => error.into(),
            Err(error) => Self::new(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_pipe_is_not_reported_and_a_full_disk_is() {
        let closed = CommandError::output(&io::ErrorKind::BrokenPipe.into());
        assert_eq!(closed.kind(), CommandErrorKind::BrokenPipe);
        let full = CommandError::output(&io::ErrorKind::StorageFull.into());
        assert_eq!(full.kind(), CommandErrorKind::Failure);
        assert!(full.to_string().starts_with("cannot write to standard output: "), "{full}");
    }
}
