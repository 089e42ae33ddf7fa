//! `nbd-cli repo key`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use nbd_jobs::repository::repository_error;
use nbd_objects::repo::Id;

use super::store::StoreArgs;
use super::text::{id, line};
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::passphrase::read_passphrase;

/// Arguments of `nbd-cli repo key`.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// The subcommand.
    #[command(subcommand)]
    pub command: KeyCommand,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List the identities of the passphrases
    List(ListArgs),
    /// Add a passphrase
    Add(AddArgs),
    /// Remove a passphrase, but never the last one
    Remove(RemoveArgs),
}

/// Arguments of `nbd-cli repo key list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,
}

/// Arguments of `nbd-cli repo key add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// File with the new passphrase: its first line.
    #[arg(long, value_name = "FILE", value_parser = FilePathParser)]
    pub new_passphrase_file: PathBuf,
}

/// Arguments of `nbd-cli repo key remove`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// The identity that 'repo key list' shows.
    #[arg(value_name = "ID", value_parser = id)]
    pub id: Id,
}

pub(super) async fn run(args: &KeyArgs) -> Result<Outcome, CommandError> {
    match &args.command {
        KeyCommand::List(args) => {
            let repository = args.store.open().await?;
            for key in repository.keys().await.map_err(repository_error)? {
                line(&key.to_string())?;
            }
            Ok(Outcome::Success)
        }
        KeyCommand::Add(args) => {
            let passphrase = read_passphrase(&args.new_passphrase_file)?;
            let repository = args.store.open().await?;
            let key = repository.add_key(&passphrase).await.map_err(repository_error)?;
            line(&format!("added: {key}"))
        }
        KeyCommand::Remove(args) => {
            let repository = args.store.open().await?;
            repository.remove_key(args.id).await.map_err(repository_error)?;
            line(&format!("removed: {}", args.id))
        }
    }
}
