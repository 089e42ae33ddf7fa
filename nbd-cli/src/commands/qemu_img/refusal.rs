//! Errors, and the exit codes that go with them.

use std::io::Write as _;

use nbd_jobs::JobError;
use nbd_jobs::text::without_error_numbers;

use crate::error::{CommandError, CommandErrorKind};

/// How the key of an image is given here.
const KEY_ADVICE: &str = "give its passphrase with --object secret,id=ID,file=FILE and the id in its \
                          options, as key-secret=ID (LUKS) or encrypt.key-secret=ID (qcow2)";

/// Why a command was not carried out.
#[derive(Debug)]
pub(super) struct Refusal {
    /// `None` if there is nothing to say: the reader of the output has gone.
    pub(super) message: Option<String>,
    /// Whether the help tells what is possible.
    pub(super) is_usage: bool,
    pub(super) code: u8,
}

impl Refusal {
    pub(super) fn new(message: impl Into<String>) -> Self {
        let message = message.into().replace(JobError::KEY_ADVICE, KEY_ADVICE);
        let message = Some(without_error_numbers(message));
        Self { message, is_usage: false, code: 1 }
    }

    /// Wrong usage.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self { is_usage: true, ..Self::new(message) }
    }

    pub(super) fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// Puts a clause after the sentence.
    pub(super) fn with(self, clause: &str) -> Self {
        let message = self.message.map(|message| message + clause);
        Self { message, ..self }
    }

    /// Puts the name of an image before the sentence.
    pub(super) fn about(self, name: &str) -> Self {
        let message = self.message.map(|message| format!("{name}: {message}"));
        Self { message, ..self }
    }
}

impl From<CommandError> for Refusal {
    fn from(error: CommandError) -> Self {
        match error.kind() {
            CommandErrorKind::BrokenPipe => Self { message: None, is_usage: false, code: 0 },
            _ => Self::new(error.to_string()),
        }
    }
}

impl From<JobError> for Refusal {
    fn from(error: JobError) -> Self {
        Self::new(error.to_string())
    }
}

impl From<imgfmt::Error> for Refusal {
    fn from(error: imgfmt::Error) -> Self {
        Self::new(error.to_string())
    }
}

impl From<imgfmt::jobs::JobError> for Refusal {
    fn from(error: imgfmt::jobs::JobError) -> Self {
        CommandError::from(error).into()
    }
}

/// Writes a line to standard error; errors are ignored, as there is no place to report them.
pub(super) fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "qemu-img: {line}");
}
