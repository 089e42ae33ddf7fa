//! The `nbd-cli` program: see the library for what it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    nbd_cli::run(std::env::args_os())
}
