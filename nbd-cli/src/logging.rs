//! Log lines: on standard error or in a file, as text or JSON.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use clap::{Args, ValueEnum};
use nbd_jobs::text::{readable, readable_json};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::error::CommandError;
use crate::output::{warn, warn_in_log};

/// The environment variable with the levels if there is no `-v`: a level, or levels of parts of the
/// program.
const LEVELS: &str = "NBD_LOG";

/// The place of the log's options in the help of every command: after the command's own.
pub(crate) const DISPLAY_ORDER: usize = 900;

/// Options of the log.
#[derive(Debug, Clone, Default, Args)]
pub struct LogArgs {
    /// Form of log lines.
    #[arg(long, value_enum, global = true, default_value_t, value_name = "FORM",
          display_order = DISPLAY_ORDER + 1)]
    pub log_format: LogFormat,

    /// Append log lines to this file instead of printing them on standard error. Opened again on
    /// SIGHUP.
    #[arg(long, global = true, value_name = "FILE", display_order = DISPLAY_ORDER + 2)]
    pub log_file: Option<PathBuf>,
}

/// Forms of log lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text.
    #[default]
    Text,
    /// A JSON object per line.
    Json,
}

/// The file of the log.
static FILE: OnceLock<LogFile> = OnceLock::new();
/// The form of the log.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

struct LogFile {
    path: PathBuf,
    file: Mutex<File>,
}

/// Starts logging: with `-v` at the level info, with more at debug or trace; otherwise at the
/// levels in NBD_LOG, by default warnings.
///
/// # Errors
///
/// If NBD_LOG is malformed, or the file cannot be opened.
pub(crate) fn start(verbosity: u8, args: &LogArgs) -> Result<(), CommandError> {
    let levels = levels(verbosity, std::env::var(LEVELS).ok().as_deref())?;
    let format = args.log_format;
    let (writer, is_terminal) = match &args.log_file {
        Some(path) => {
            let path = std::path::absolute(path).map_err(|error| cannot_open(path, &error))?;
            let file = Mutex::new(open(&path).map_err(|error| cannot_open(&path, &error))?);
            // A process has at most one.
            let file = FILE.get_or_init(|| LogFile { path, file });
            (BoxMakeWriter::new(move || Line(format, Some(file))), false)
        }
        None => (BoxMakeWriter::new(move || Line(format, None)), io::stderr().is_terminal()),
    };
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(is_terminal)
        .with_target(false)
        // A line that cannot be written, for example to a full disk, is lost: reporting that to the
        // same place would panic, and end a connection.
        .log_internal_errors(false);
    let subscriber = tracing_subscriber::registry().with(levels);
    FORMAT.get_or_init(|| args.log_format);
    // Fails only if a subscriber is set already, as in a test that runs two commands.
    let _ = match args.log_format {
        LogFormat::Text => subscriber.with(layer).try_init(),
        LogFormat::Json => subscriber.with(layer.json().flatten_event(true)).try_init(),
    };
    Ok(())
}

fn levels(verbosity: u8, variable: Option<&str>) -> Result<Targets, CommandError> {
    let level = match (verbosity, variable) {
        (0, None | Some("")) => LevelFilter::WARN,
        (0, Some(levels)) => {
            return levels.parse().map_err(|_| {
                CommandError::new(format!(
                    "{LEVELS} is '{levels}'; write error, warn, info, debug or trace, or levels \
                     of parts, as in info,nbd_server=debug"
                ))
            });
        }
        (1, _) => LevelFilter::INFO,
        (2, _) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    Ok(Targets::new().with_default(level))
}

/// Sends the warnings of a running server to the log if that is a file or JSON. The standard error
/// of a server in the background has no reader.
pub(crate) fn include_warnings() {
    if FILE.get().is_some() || FORMAT.get() == Some(&LogFormat::Json) {
        warn_in_log();
    }
}

/// Opens the file of the log again, after another program has renamed it. Without a file, and if
/// the new one cannot be opened, nothing changes.
pub(crate) fn reopen() {
    let Some(log) = FILE.get() else { return };
    match open(&log.path) {
        Ok(file) => *log.file.lock().unwrap_or_else(PoisonError::into_inner) = file,
        Err(error) => {
            warn(&format!("{}; the previous one is used", cannot_open(&log.path, &error)));
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

fn cannot_open(path: &Path, error: &io::Error) -> CommandError {
    CommandError::new(format!("cannot open the log file '{}': {error}", path.display()))
}

/// Writes a line, which arrives complete, to a file or to standard error.
struct Line(LogFormat, Option<&'static LogFile>);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let text = match self.0 {
            LogFormat::Text => readable(&text),
            LogFormat::Json => readable_json(&text),
        };
        match self.1 {
            Some(log) => {
                let mut file = log.file.lock().unwrap_or_else(PoisonError::into_inner);
                file.write_all(text.as_bytes())?;
            }
            None => io::stderr().write_all(text.as_bytes())?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_comes_before_the_variable() {
        let shown = |verbosity, variable| levels(verbosity, variable).map(|it| it.to_string());
        assert_eq!(shown(0, None).unwrap(), "warn");
        assert_eq!(shown(0, Some("debug")).unwrap(), "debug");
        assert_eq!(shown(1, Some("error")).unwrap(), "info");
        assert!(shown(0, Some("info,nbd_server=trace")).unwrap().contains("nbd_server=trace"));
        assert!(shown(0, Some("nbd=loud")).unwrap_err().to_string().contains("NBD_LOG"));
    }
}
