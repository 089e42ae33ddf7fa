//! Restores a backup in a repository.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Args;
use imgfmt::{Format, Image, OpenOptions, Storage};
use nbd_jobs::repository::{open_disk, split_address};
use nbd_jobs::{
    JobContext, JobError, JobErrorKind, RestoreCheck, RestoreOptions, Restored, restore_image,
};
use nbd_objects::repo::Damage;

use super::RestoreArgs;
use crate::commands::repo::{PassphraseArgs, open};
use crate::error::CommandError;
use crate::output::warn;

/// Damaged blocks that are named one by one.
const NAMED_MAX: u64 = 20;

/// Options of backups in a repository.
#[derive(Debug, Args)]
#[command(next_help_heading = "Backups in a repository")]
pub struct RepositoryArgs {
    /// Restore everything else if blocks in a repository are missing or damaged: they become zeroes
    /// and are named, and the command fails at the end.
    #[arg(long)]
    pub skip_damaged: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub passphrase: PassphraseArgs,
}

/// Returns the address of a backup in a repository, if the name is one.
pub(super) fn address(image: &Path) -> Option<&str> {
    image.to_str()?.strip_prefix("backup:")
}

pub(super) async fn restore(
    args: &RestoreArgs,
    address: &str,
    mut options: RestoreOptions,
    context: &JobContext,
) -> Result<Result<Restored, JobError>, CommandError> {
    let (repository, backup) = split_address(address).ok_or_else(|| {
        CommandError::new(format!(
            "'backup:{address}' does not name a backup; write backup:REPOSITORY/NAME@latest"
        ))
    })?;
    let repository = open(&repository.into(), &args.repository.passphrase).await?;
    let damaged = Arc::new(AtomicU64::new(0));
    let damage = match args.repository.skip_damaged {
        false => Damage::Refused,
        true => {
            let damaged = Arc::clone(&damaged);
            Damage::Told(Arc::new(move |_, error| {
                if damaged.fetch_add(1, Ordering::Relaxed) < NAMED_MAX {
                    warn(&error.to_string());
                }
            }))
        }
    };
    let storage = open_disk(&repository, backup, damage).await?;
    // What the disk holds is never taken for an image.
    let raw = OpenOptions::new().format(Format::Raw);
    let disk: Arc<dyn Storage> = Arc::clone(&storage) as _;
    // Every block is checked against its hash when it is read.
    options.check = RestoreCheck::Off;
    let name = format!("backup:{address}");
    let restored = match Image::from_storage(disk, &raw) {
        Ok(image) => {
            restore_image(image, &name, &args.destination.location, &options, context).await
        }
        Err(error) => Err(JobError::image(JobErrorKind::Source, error)),
    };
    // Reads that were given up may still hold it.
    storage.close().await;
    let count = damaged.load(Ordering::Relaxed);
    if restored.is_ok() && count > 0 {
        return Err(CommandError::new(format!(
            "{count} blocks of 64 KiB of '{name}' are lost and were restored as zeroes; everything \
             else was restored"
        )));
    }
    Ok(restored)
}
