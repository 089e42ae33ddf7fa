//! `nbd-cli tls psk`: users of a file of pre-shared keys.

use std::path::PathBuf;

use clap::Args;
use nbd_jobs::certificates::{AddUser, add_user, parse_user};
use nbd_proto::tls::PSK_FILE;

use super::existing::existing;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, printable};
use crate::shown::warnings;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli tls psk alice                                        adds alice to ./keys.psk
  nbd-cli tls psk bob --file /etc/nbd/keys.psk --client-file bob.psk
  nbd-cli serve --tls-psk keys.psk disk.img
  nbd-cli info --tls-psk bob.psk nbds://bob@vmhost/

The server has a file with all users. A client needs only its own key. A running server reads its
file again on SIGHUP.";

/// Arguments of `nbd-cli tls psk`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct PskArgs {
    /// Name of the user, as in nbds://USER@HOST/.
    #[arg(value_parser = parse_user)]
    pub user: String,

    /// File of the server, to which the user is added.
    #[arg(long, value_name = "FILE", default_value = PSK_FILE)]
    pub file: PathBuf,

    /// Write a file with this user alone, for the client.
    #[arg(long, value_name = "FILE")]
    pub client_file: Option<PathBuf>,

    /// Replace the key of an existing user, and an existing client file.
    #[arg(long)]
    pub force: bool,
}

pub(super) fn run(args: &PskArgs) -> Result<Outcome, CommandError> {
    let mut added = AddUser::new(&args.user, &args.file);
    added.client_file = args.client_file.as_deref();
    added.existing = existing(args.force);
    add_user(&added, &*warnings())?;
    let mut output = Output::new();
    for path in args.client_file.iter().chain([&args.file]) {
        output.line(&printable(&path.display().to_string()))?;
    }
    output.finish()?;
    Ok(Outcome::Success)
}
