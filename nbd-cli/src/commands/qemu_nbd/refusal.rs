//! Messages to the caller: output, and the reason why nothing is served or listed.

use std::io::Write as _;

use nbd_jobs::qemu_nbd::CommandLineError;

use crate::error::CommandError;

/// The reason why nothing is served or listed.
#[derive(Debug)]
pub(super) struct Refusal {
    /// `None` if it has been reported already.
    pub(super) message: Option<String>,
    pub(super) advice: Option<&'static str>,
}

impl Refusal {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: Some(message.into()), advice: None }
    }

    /// A failure that another process has reported.
    pub(super) fn already_reported() -> Self {
        Self { message: None, advice: None }
    }
}

impl From<CommandError> for Refusal {
    fn from(error: CommandError) -> Self {
        Self::new(error.to_string())
    }
}

impl From<CommandLineError> for Refusal {
    fn from(error: CommandLineError) -> Self {
        let advice = error.is_usage().then_some("Try 'qemu-nbd --help' for more information.");
        Self { message: Some(error.to_string()), advice }
    }
}

pub(super) fn print(text: &str) -> Result<(), Refusal> {
    let mut stdout = std::io::stdout().lock();
    let printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    match printed {
        // A reader that looks for one line may close the pipe then.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Refusal::new(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Writes a line to standard error; errors are ignored, as there is no place to report them.
pub(super) fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "qemu-nbd: {line}");
}
