//! Writes the manual pages of the program from the definitions of its command line:
//! `cargo xtask man DIR`.
//!
//! It is not part of the program, because packages contain the pages.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::{Command, CommandFactory as _};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};
use nbd_cli::args::Cli;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("usage: cargo xtask man DIR");
        return ExitCode::FAILURE;
    };
    match write_pages(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write to '{}': {error}", directory.display());
            ExitCode::FAILURE
        }
    }
}

/// Writes one page for each command, such as `nbd-cli-image-info.1`.
pub(crate) fn write_pages(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    write_page(&command, None, directory)
}

fn write_page(command: &Command, above: Option<&str>, directory: &Path) -> io::Result<()> {
    let page = Man::new(command.clone())
        // No date, so that two builds are equal. The generator drops an empty word.
        .date(" ")
        .source(format!("nbd-cli {}", env!("CARGO_PKG_VERSION")))
        .manual("User Commands");
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        page.render_options_section(&mut text)?;
    }
    let subcommands = || command.get_subcommands().filter(|command| !command.is_hide_set());
    if subcommands().next().is_some() {
        page.render_subcommands_section(&mut text)?;
    }
    let after = command.get_after_long_help().or_else(|| command.get_after_help());
    let mut roff = sections(&after.map(ToString::to_string).unwrap_or_default());
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let below = subcommands().filter_map(Command::get_display_name);
    see_also(&mut roff, above.into_iter().chain(below));
    text.extend(roff.to_roff().into_bytes());
    fs::write(directory.join(page.get_filename()), text)?;
    subcommands().try_for_each(|below| write_page(below, Some(name), directory))
}

/// The text after the help: `Examples:` and `Exit codes:` become sections.
fn sections(after: &str) -> Roff {
    let mut roff = Roff::new();
    let mut in_notes = false;
    for block in after.split("\n\n") {
        let (title, rest) = match block.split_once('\n') {
            Some(("Examples:", rest)) => (Some("EXAMPLES"), rest),
            Some(("Exit codes:", rest)) => (Some("EXIT STATUS"), rest),
            _ => (None, block),
        };
        match title {
            Some(title) => {
                roff.control("SH", [title]);
                in_notes = false;
            }
            None if rest.trim().is_empty() => continue,
            None if in_notes => {
                roff.control("PP", []);
            }
            None => {
                roff.control("SH", ["NOTES"]);
                in_notes = true;
            }
        }
        lines(&mut roff, rest);
    }
    roff
}

/// Indented lines are kept, others are filled.
fn lines(roff: &mut Roff, text: &str) {
    let mut is_literal = false;
    for line in text.lines() {
        if line.starts_with(' ') != is_literal {
            is_literal = !is_literal;
            roff.control(if is_literal { "nf" } else { "fi" }, []);
        }
        roff.text([roman(line.trim_end())]);
    }
    if is_literal {
        roff.control("fi", []);
    }
}

fn see_also<'a>(roff: &mut Roff, names: impl Iterator<Item = &'a str>) {
    let names: Vec<_> = names.map(|name| format!("{name}(1)")).collect();
    if !names.is_empty() {
        roff.control("SH", ["SEE ALSO"]);
        roff.text([roman(names.join(", "))]);
    }
}
