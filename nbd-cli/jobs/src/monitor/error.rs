//! Errors of the monitor.

use std::fmt;
use std::io;

/// The reason why a monitor cannot be started.
#[derive(Debug)]
#[non_exhaustive]
pub enum MonitorError {
    /// The address is in use, not permitted or unknown.
    Address {
        /// The address: `HOST:PORT` or a path.
        address: String,
        /// The reason.
        error: io::Error,
    },
    /// The system has no thread for it.
    Thread(io::Error),
}

impl fmt::Display for MonitorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { address, error } => {
                let why = match error.kind() {
                    io::ErrorKind::AddrInUse => "another program listens there".to_owned(),
                    io::ErrorKind::PermissionDenied => "that is not permitted".to_owned(),
                    _ => in_words(error),
                };
                write!(
                    f,
                    "the metrics cannot be served at '{address}': {why}; give another address for \
                     --metrics"
                )
            }
            Self::Thread(error) => write!(f, "cannot start the status page: {}", in_words(error)),
        }
    }
}

impl std::error::Error for MonitorError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Address { error, .. } | Self::Thread(error) => Some(error),
        }
    }
}

/// The message of the system, without its number.
pub(super) fn in_words(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_lowercase(),
        None => text,
    }
}
