//! A snapshot of the whole help, reviewed as a diff.

use std::fs;
use std::path::Path;
use std::process::Command;

use clap::CommandFactory as _;
use nbd_cli::args::Cli;

use crate::support::{PROGRAM, run};

/// Rewrites the text instead of comparing with it.
const WRITE: &str = "NBD_CLI_WRITE_HELP";

#[test]
fn the_help_of_every_command_is_the_reviewed_text() {
    let mut text = String::new();
    add_help(&mut text, &Cli::command(), &[]);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/help.txt");
    if std::env::var_os(WRITE).is_some() {
        fs::write(&file, &text).expect("the text is written");
        return;
    }
    let reviewed = fs::read_to_string(&file).expect("the text");
    for (number, (line, expected)) in text.lines().zip(reviewed.lines()).enumerate() {
        assert_eq!(line, expected, "line {} of help.txt; {}", number + 1, remedy());
    }
    assert_eq!(text.lines().count(), reviewed.lines().count(), "lines of help.txt; {}", remedy());
}

fn remedy() -> String {
    format!("if the help should change: {WRITE}=1 cargo test -p nbd-cli --test cli help_snapshot")
}

/// Adds the help of `command`, called by `names`, and of all commands below it.
fn add_help(text: &mut String, command: &clap::Command, names: &[&str]) {
    let help = run(Command::new(PROGRAM).args(names).arg("--help").env("COLUMNS", "100")).success();
    text.push_str(&format!("===== nbd-cli {}\n\n", [names, &["--help"]].concat().join(" ")));
    for line in help.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push('\n');
    for below in command.get_subcommands() {
        add_help(text, below, &[names, &[below.get_name()]].concat());
    }
}
