//! Standard output: reports as text and as JSON, and text that is safe to print.

use std::io::{self, BufWriter, IsTerminal as _, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use nbd_jobs::text::{readable, readable_json, without_error_numbers};
use serde::Serialize;

use crate::error::{CommandError, CommandErrorKind};
pub(crate) use nbd_jobs::text::printable;

/// The form of a report: text or JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReportFormat {
    Text,
    Json,
}

impl ReportFormat {
    /// Selected by the `--json` flag.
    pub(crate) fn from_json_flag(json: bool) -> Self {
        if json { Self::Json } else { Self::Text }
    }
}

/// Standard output, buffered; [`finish`](Self::finish) must be called at the end.
pub(crate) struct Output {
    writer: BufWriter<StdoutLock<'static>>,
}

impl Output {
    pub(crate) fn new() -> Self {
        Self { writer: BufWriter::with_capacity(32 * 1024, io::stdout().lock()) }
    }

    /// Writes one line of text.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), CommandError> {
        self.text(&readable(text))?;
        self.text("\n")
    }

    /// Writes text without changes.
    pub(crate) fn text(&mut self, text: &str) -> Result<(), CommandError> {
        self.writer.write_all(text.as_bytes()).map_err(|error| CommandError::output(&error))
    }

    /// Writes a value as indented JSON.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<(), CommandError> {
        let text = serde_json::to_string_pretty(value);
        self.text(&readable_json(&text.map_err(|error| CommandError::output(&error.into()))?))?;
        self.text("\n")
    }

    /// Writes a value as JSON in one line, without its end.
    pub(crate) fn compact_json(&mut self, value: &impl Serialize) -> Result<(), CommandError> {
        let text = serde_json::to_string(value);
        self.text(&readable_json(&text.map_err(|error| CommandError::output(&error.into()))?))
    }

    /// Flushes the output.
    pub(crate) fn finish(mut self) -> Result<(), CommandError> {
        self.writer.flush().map_err(|error| CommandError::output(&error))
    }
}

/// Refuses to write a disk to a terminal.
pub(crate) fn refuse_terminal() -> Result<(), CommandError> {
    match io::stdout().is_terminal() {
        true => Err(CommandError::new(
            "standard output is a terminal, which cannot show a disk; redirect it to a file or a pipe",
        )),
        false => Ok(()),
    }
}

/// Ends a report whose result is also in the exit code: a closed pipe must not turn that code into
/// success.
pub(crate) fn unless_closed(written: Result<(), CommandError>) -> Result<(), CommandError> {
    written.or_else(|error| match error.kind() {
        CommandErrorKind::BrokenPipe => Ok(()),
        CommandErrorKind::CopyCutShort | CommandErrorKind::Failure => Err(error),
    })
}

/// Whether warnings are lines of the log.
static WARNS_IN_LOG: AtomicBool = AtomicBool::new(false);

/// Writes all further warnings to the log.
pub(crate) fn warn_in_log() {
    WARNS_IN_LOG.store(true, Ordering::Relaxed);
}

/// Writes a warning to standard error or to the log; a closed standard error is not an error.
pub(crate) fn warn(message: &str) {
    let message = readable(&without_error_numbers(message.to_owned()));
    if WARNS_IN_LOG.load(Ordering::Relaxed) && tracing::enabled!(tracing::Level::WARN) {
        return tracing::warn!("{message}");
    }
    let _ = writeln!(io::stderr(), "nbd-cli: warning: {message}");
}
