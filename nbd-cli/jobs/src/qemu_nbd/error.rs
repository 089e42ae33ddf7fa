//! Errors of a command line.

use std::fmt;

/// Why a command line cannot be carried out, in one sentence without the program's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLineError {
    message: String,
    is_usage: bool,
}

impl CommandLineError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), is_usage: false }
    }

    /// The command line is not made of options and a file.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), is_usage: true }
    }

    /// Returns whether the help tells what is possible: an option is unknown, or lacks its value,
    /// or there is not exactly one operand.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        self.is_usage
    }
}

impl fmt::Display for CommandLineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CommandLineError {}
