//! `nbd-cli completions`: shell completion scripts for this command line.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::args::Cli;
use crate::error::{CommandError, Outcome};
use crate::output::Output;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli completions bash > ~/.local/share/bash-completion/completions/nbd-cli
  nbd-cli completions fish > ~/.config/fish/completions/nbd-cli.fish";

/// Arguments of `nbd-cli completions`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CompletionsArgs {
    /// The shell for which to write the script.
    #[arg(value_enum)]
    pub shell: Shell,
}

pub(crate) fn run(args: &CompletionsArgs) -> Result<Outcome, CommandError> {
    // Written to memory first: the generator panics if its writer fails, as a closed pipe does.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "nbd-cli", &mut script);
    let mut output = Output::new();
    output.text(&String::from_utf8_lossy(&script))?;
    output.finish()?;
    Ok(Outcome::Success)
}
