//! Developer commands, run as `cargo xtask COMMAND`.
//!
//! Each command has one file or directory; this file only dispatches. The crate depends on none of
//! the others, so that it can check them even when they do not compile.
#![expect(clippy::print_stdout, reason = "developer commands report on standard output")]

mod apt;
mod bare;
mod bench;
mod ceph;
mod ci;
mod command;
mod compatibility;
mod dist;
mod install;
mod iotests;
mod machine;
mod man;
mod peers;
mod seaweedfs;
mod soak;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of this workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: DeveloperCommand,
}

#[derive(Debug, Subcommand)]
enum DeveloperCommand {
    /// Run every check in the order of continuous integration; stop at the first that fails.
    Ci,
    /// Install missing programs that tests use, and a kernel.
    Peers,
    /// Check the project rules that rustfmt and clippy do not check.
    Tidy,
    /// Measure this server beside qemu-nbd, nbdkit and nbd-server on the same file.
    Bench(bench::Options),
    /// Install the program, with the system's OpenSSL where it is complete.
    Install(install::Options),
    /// Make what is shipped: a tarball and a Debian package.
    Dist(dist::Options),
    /// Write the manual pages of the program.
    Man(man::Options),
    /// Run every random judge for a chosen time and keep the failures.
    Soak(soak::Options),
    /// Run QEMU's own tests of qemu-img with this program in its place.
    Iotests(iotests::Options),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        DeveloperCommand::Ci => ci::run(),
        DeveloperCommand::Peers => peers::ensure_installed(),
        DeveloperCommand::Tidy => tidy::run(),
        DeveloperCommand::Bench(options) => bench::run(&options),
        DeveloperCommand::Install(options) => install::run(&options),
        DeveloperCommand::Dist(options) => dist::run(&options),
        DeveloperCommand::Man(options) => man::run(&options),
        DeveloperCommand::Soak(options) => soak::run(&options),
        DeveloperCommand::Iotests(options) => iotests::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
