//! Completion scripts.

use crate::support::nbd_cli;

#[test]
fn every_shell_gets_a_script_that_knows_the_commands() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = nbd_cli(&["completions", shell]).success();
        for command in ["serve", "info", "list-meta", "map", "copy"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
}
