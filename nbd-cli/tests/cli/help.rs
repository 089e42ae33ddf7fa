//! Help, version, usage errors.

use std::collections::BTreeSet;
use std::process::Command;

use clap::CommandFactory as _;
use nbd_cli::args::Cli;

use crate::support::{PROGRAM, nbd_cli, run};
use crate::tools;

#[test]
fn every_command_has_help_with_examples() {
    for command in ["serve", "info", "list-meta", "map", "copy", "image", "completions"] {
        let help = nbd_cli(&[command, "--help"]).success();
        assert!(help.contains("Examples:"), "{command}: {help}");
        assert!(help.contains(&format!("nbd-cli {command}")), "{command}: {help}");
    }
}

#[test]
fn every_image_command_has_help_with_examples() {
    let commands = [
        "create", "info", "check", "map", "convert", "resize", "rebase", "commit", "snapshot",
        "measure", "compare",
    ];
    for command in commands {
        let help = nbd_cli(&["image", command, "--help"]).success();
        assert!(help.contains("Examples:"), "{command}: {help}");
        assert!(help.contains(&format!("nbd-cli image {command}")), "{command}: {help}");
    }
}

#[test]
fn help_is_wrapped_once_for_its_terminal() {
    tools!(script = "script", _stty = "stty");
    for (command, columns) in
        [("copy", 60), ("copy", 80), ("image convert", 80), ("serve", 80), ("backup", 100)]
    {
        let inside = format!("stty rows 24 cols {columns}; exec {PROGRAM} {command} --help");
        let help = run(Command::new(&script).args(["-qec", &inside, "/dev/null"])).success();
        let lines: Vec<_> = help.lines().map(str::trim_end).collect();
        for (line, next) in lines.iter().zip(&lines[1..]) {
            let is_text = |line: &str| !line.is_empty() && !line.starts_with(' ');
            if !is_text(line) || !is_text(next) || line.ends_with(':') {
                continue;
            }
            // The next word would not have fitted.
            let word = next.split(' ').next().unwrap_or_default().chars().count();
            let width = line.chars().count();
            assert!(width <= columns && width + 1 + word > columns, "{command}: {line:?} {next:?}");
        }
    }
}

/// The arguments of a command and of all below it: the command, the heading and the argument.
fn arguments_of(command: &clap::Command, name: &str) -> Vec<(String, Option<String>, String)> {
    let own = command.get_arguments().map(|argument| {
        let heading = argument.get_help_heading().map(str::to_owned);
        assert!(heading.is_none() || !argument.is_positional(), "{name}: {argument}, {heading:?}");
        (name.to_owned(), heading, argument.get_id().to_string())
    });
    let below = command.get_subcommands();
    let below =
        below.flat_map(|below| arguments_of(below, &format!("{name} {}", below.get_name())));
    own.chain(below).collect()
}

#[test]
fn headings_in_the_help_are_of_the_same_options_in_every_command() {
    let arguments = arguments_of(&Cli::command(), "nbd-cli");
    for heading in ["Object stores", "TLS (for nbds URIs"] {
        let under = arguments
            .iter()
            .filter(|(_, other, _)| other.as_ref().is_some_and(|other| other.starts_with(heading)));
        let options: BTreeSet<_> = under.map(|(_, _, option)| option).collect();
        for (command, other, option) in &arguments {
            let is_server = command == "nbd-cli serve";
            let is_other = !other.as_ref().is_some_and(|other| other.starts_with(heading));
            let is_wrong = is_other && !is_server && options.contains(option);
            assert!(!is_wrong, "{command}: --{option} is under {other:?}, elsewhere {heading}");
        }
    }
}

#[test]
fn examples_in_the_help_fit_into_a_line() {
    fn check(command: &clap::Command) {
        let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for line in text.lines().filter(|line| line.starts_with("  ")) {
            assert!(line.chars().count() <= 100, "{}: {line}", command.get_name());
        }
        command.get_subcommands().for_each(check);
    }
    check(&Cli::command());
}

#[test]
fn options_of_the_log_come_after_those_of_the_command() {
    let help = nbd_cli(&["serve", "--help"]).success();
    let place = |option: &str| help.find(option).unwrap_or_else(|| panic!("{option}: {help}"));
    let places =
        ["  --check", "  --hidden", "  -v, --verbose", "  --log-file <FILE>", "  -h, --help"];
    assert!(places.map(place).is_sorted(), "{help}");
}

#[test]
fn the_exit_codes_are_documented() {
    let help = nbd_cli(&["--help"]).success();
    for line in ["Exit codes:", "  0  success", "  1  an error", "  2  for `info"] {
        assert!(help.contains(line), "{line}: {help}");
    }
}

#[test]
fn the_version_is_that_of_the_package() {
    let version = nbd_cli(&["--version"]).success();
    assert_eq!(version, format!("nbd-cli {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_exits_with_1() {
    for arguments in [&[][..], &["nothing"], &["serve"], &["map", "--nothing"], &["copy", "a"]] {
        let outcome = nbd_cli(arguments);
        assert_eq!(outcome.code, Some(1), "{arguments:?}: {outcome:?}");
        assert!(!outcome.stderr.is_empty() && outcome.stdout.is_empty(), "{outcome:?}");
    }
}
