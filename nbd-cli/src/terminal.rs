//! The capabilities of terminals.

use std::io::IsTerminal as _;
use std::os::fd::AsFd;

use clap::ValueEnum;
use nbd_jobs::chart::{CharacterSet, Color};

/// Whether output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// If standard output is a terminal and NO_COLOR is not set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Determines the formatting for standard output.
pub(crate) fn color(choice: ColorChoice) -> Color {
    let wanted = match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => {
            let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
            std::io::stdout().is_terminal() && !refused && !dumb
        }
    };
    if wanted { Color::On } else { Color::Off }
}

/// Returns the character set of the user's locale.
pub(crate) fn character_set() -> CharacterSet {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .iter()
        .filter_map(std::env::var_os)
        .find(|value| !value.is_empty())
        .map(|value| value.to_string_lossy().to_lowercase())
        .unwrap_or_default();
    if locale.contains("utf-8") || locale.contains("utf8") {
        CharacterSet::Unicode
    } else {
        CharacterSet::Ascii
    }
}

/// Returns the width of the terminal in columns, at least 20; 80 if standard output is not a
/// terminal.
pub(crate) fn columns() -> usize {
    columns_of(std::io::stdout()).max(20)
}

/// Returns the width of a terminal in columns; 80 if it is unknown, or not a terminal.
pub(crate) fn columns_of(terminal: impl AsFd) -> usize {
    match rustix::termios::tcgetwinsize(terminal) {
        Ok(size) if size.ws_col > 0 => usize::from(size.ws_col),
        _ => 80,
    }
}
