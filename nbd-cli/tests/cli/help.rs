//! Help, version, usage errors.

use std::process::Command;

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
