//! The `nbd-cli` program: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    nbd_cli::run(std::env::args_os())
}
