//! `cargo xtask man`: the manual pages of the program.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::command::{cargo, run_step};

/// Arguments of `cargo xtask man`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Directory for the pages, such as target/man; created if it does not exist.
    directory: PathBuf,
}

/// Writes one page for each command. The program's own code makes them (`nbd-cli/examples/man.rs`).
///
/// # Errors
///
/// The program does not compile, or the directory cannot be written to.
pub(crate) fn run(options: &Options) -> Result<()> {
    write(&options.directory)
}

/// Writes the pages to `directory`.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn write(directory: &Path) -> Result<()> {
    let mut command = cargo();
    command.args(["run", "--quiet", "--locked", "--package", "nbd-cli", "--example", "man", "--"]);
    // The command runs in another directory.
    let directory = std::path::absolute(directory)
        .with_context(|| format!("cannot find {}", directory.display()))?;
    run_step("man", command.arg(directory)).map(drop)
}
