//! `cargo xtask install`: installs the program in the user's directory of programs.
//!
//! Cargo cannot choose a feature by what the system has. This command can: it links the system's
//! OpenSSL where that is complete, and builds its own otherwise.

use std::ffi::OsString;
use std::process::{Command, Stdio};

use anyhow::Result;
use clap::Args;

use crate::command::{cargo, run_step};

/// The oldest OpenSSL whose system libraries are linked: the oldest that is still maintained.
const OLDEST_OPENSSL: &str = "3.0.0";

/// Arguments of `cargo xtask install`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Build OpenSSL from its source even where the system has it.
    #[arg(long)]
    vendored: bool,
    /// Arguments for `cargo install`, such as `--root DIR` or `--profile dist`.
    #[arg(value_name = "OPTION", trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Runs `cargo install` for the program, with the system's OpenSSL where that is complete.
///
/// # Errors
///
/// The program does not compile, or cannot be written to its directory.
pub(crate) fn run(options: &Options) -> Result<()> {
    let vendored = options.vendored || !system_has_openssl();
    let mut command = cargo();
    // Relative paths among the arguments are the user's, not the workspace's.
    if let Ok(directory) = std::env::current_dir() {
        command.current_dir(directory);
    }
    command.args(["install", "--locked", "--path"]);
    command.arg(crate::command::workspace_root().join("nbd-cli"));
    choose_openssl(&mut command, vendored);
    run_step("install", command.args(&options.arguments)).map(drop)
}

/// Lets the build of `command` link the system's OpenSSL, or build its own.
pub(crate) fn choose_openssl(command: &mut Command, vendored: bool) {
    if vendored {
        println!("==> openssl: built from its source");
        command.env_remove("OPENSSL_NO_VENDOR");
    } else {
        println!("==> openssl: the system's");
        command.env("OPENSSL_NO_VENDOR", "1");
    }
}

/// Whether pkg-config finds the libraries and headers of a maintained OpenSSL.
///
/// The build finds them by pkg-config as well: without it they count as missing.
pub(crate) fn system_has_openssl() -> bool {
    let mut command = Command::new("pkg-config");
    command.arg(format!("--atleast-version={OLDEST_OPENSSL}")).arg("openssl");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn the_choice_of_openssl_does_not_depend_on_the_users_environment() {
        for (vendored, expected) in [(true, None), (false, Some(OsStr::new("1")))] {
            let mut command = Command::new("cargo");
            choose_openssl(&mut command, vendored);
            let value = command.get_envs().find(|(name, _)| *name == "OPENSSL_NO_VENDOR");
            assert_eq!(value, Some((OsStr::new("OPENSSL_NO_VENDOR"), expected)));
        }
    }
}
