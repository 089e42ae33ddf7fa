//! `cargo xtask bench`: builds the benchmark of the package `benches` and replaces this process
//! with it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::command::{cargo, workspace_root};

/// The arguments of the benchmark: see `cargo xtask bench --help`.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    #[arg(value_name = "OPTION", trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Replaces this process with the benchmark, so that signals reach only the benchmark.
///
/// # Errors
///
/// Cargo cannot be started.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut command = cargo();
    command.args(["run", "--quiet", "-p", "benches", "--bin", "bench", "--manifest-path"]);
    command.arg(workspace_root().join("Cargo.toml")).arg("--");
    // Paths among the arguments are relative to the user's directory, not to the workspace.
    if let Ok(directory) = std::env::current_dir() {
        command.current_dir(directory);
    }
    Err(command.args(&options.arguments).exec()).context("cannot start cargo")
}
