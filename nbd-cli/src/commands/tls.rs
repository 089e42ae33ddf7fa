//! `nbd-cli tls`: an authority, certificates and pre-shared keys, in the files that servers and
//! clients read.

mod existing;
mod issue;
mod psk;
mod renew;
mod show;

use clap::{Args, Subcommand};

use crate::error::{CommandError, Outcome};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli tls init pki
  nbd-cli tls server --authority pki vmhost vmhost.example.com 192.0.2.7
  nbd-cli tls client --authority pki laptop-1
  nbd-cli serve --tls-certificates pki/vmhost disk.img
  nbd-cli info --tls-certificates pki/laptop-1 nbds://vmhost/
  nbd-cli tls show pki
  nbd-cli tls renew pki
  nbd-cli tls psk alice --file keys.psk --client-file alice.psk

The files have the names and the layout that QEMU and libnbd use. Keys are readable by their owner
only. An existing file is never replaced without --force, and only when the new one is complete.

The directory of the authority holds ca-key.pem, with which anyone can issue certificates: keep it
away from servers and clients. Each of these needs only its own directory, such as pki/vmhost.";

/// Arguments of `nbd-cli tls`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct TlsArgs {
    /// The subcommand.
    #[command(subcommand)]
    pub command: TlsCommand,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum TlsCommand {
    /// Create an authority that issues certificates
    Init(issue::InitArgs),
    /// Issue the certificate of a server
    Server(issue::ServerArgs),
    /// Issue the certificate of a client
    Client(issue::ClientArgs),
    /// Add a user to a file of pre-shared keys
    Psk(psk::PskArgs),
    /// Describe certificates and keys, and report those that expire soon
    Show(show::ShowArgs),
    /// Renew the certificates of an authority that expire soon
    Renew(renew::RenewArgs),
}

pub(crate) fn run(args: &TlsArgs) -> Result<Outcome, CommandError> {
    match &args.command {
        TlsCommand::Init(args) => issue::init(args),
        TlsCommand::Server(args) => issue::server(args),
        TlsCommand::Client(args) => issue::client(args),
        TlsCommand::Psk(args) => psk::run(args),
        TlsCommand::Show(args) => show::run(args),
        TlsCommand::Renew(args) => renew::run(args),
    }
}
