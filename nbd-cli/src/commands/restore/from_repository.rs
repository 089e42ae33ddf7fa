//! Restores a backup in a repository.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Args;
use imgfmt::{Format, Image, OpenOptions, Storage};
use nbd_jobs::repository::{repository_error, split_address};
use nbd_jobs::{
    JobContext, JobError, JobErrorKind, Location, RestoreCheck, RestoreOptions, Restored,
    restore_image,
};
use nbd_objects::repo::{Damage, Head, Id, Repository};

use super::RestoreArgs;
use crate::commands::repo::{PassphraseArgs, open};
use crate::error::CommandError;
use crate::output::warn;

/// Damaged blocks that are named one by one.
const NAMED_MAX: u64 = 20;

/// Options of backups in a repository.
#[derive(Debug, Args)]
pub struct RepositoryArgs {
    /// Restore everything else if blocks in a repository are missing or damaged: they become zeroes
    /// and are named, and the command fails at the end.
    #[arg(long, help_heading = "Backups in a repository")]
    pub skip_damaged: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub passphrase: PassphraseArgs,
}

/// Returns the address of a backup in a repository, if the name is one.
pub(super) fn address(image: &Path) -> Option<&str> {
    image.to_str()?.strip_prefix("backup:")
}

/// Restores a backup, or one disk of it; all of its disks if the destination is a folder.
pub(super) async fn restore(
    args: &RestoreArgs,
    address: &str,
    options: RestoreOptions,
    context: &JobContext,
) -> Result<Result<Restored, JobError>, CommandError> {
    let (repository, backup) = split_address(address).ok_or_else(|| {
        CommandError::new(format!(
            "'backup:{address}' does not name a backup; write backup:REPOSITORY/NAME@latest"
        ))
    })?;
    let repository = open(&repository.into(), &args.repository.passphrase).await?;
    let found = repository.find_disk(backup).await.map_err(repository_error)?;
    let mut work = Restore {
        name: format!("backup:{address}"),
        repository,
        options,
        context,
        skip_damaged: args.repository.skip_damaged,
        damaged: Arc::default(),
    };
    // Every block is checked against its hash when it is read.
    work.options.check = RestoreCheck::Off;
    let restored = match (&args.destination.location, found) {
        (Location::File(folder), (id, head, None)) if !head.disks.is_empty() && folder.is_dir() => {
            work.all(id, &head, folder).await
        }
        (to, (id, _, disk)) => work.disk((id, disk.as_deref()), to).await,
    };
    let count = work.damaged.load(Ordering::Relaxed);
    if restored.is_ok() && count > 0 {
        return Err(CommandError::new(format!(
            "{count} blocks of 64 KiB of '{}' are lost and were restored as zeroes; everything else \
             was restored",
            work.name
        )));
    }
    Ok(restored)
}

struct Restore<'a> {
    /// As the user names it.
    name: String,
    repository: Repository,
    options: RestoreOptions,
    context: &'a JobContext,
    skip_damaged: bool,
    /// Blocks that are lost.
    damaged: Arc<AtomicU64>,
}

impl Restore<'_> {
    /// Restores every disk to a file of its name.
    async fn all(&self, id: Id, head: &Head, folder: &Path) -> Result<Restored, JobError> {
        let suffix = if self.options.format == Format::Qcow2 { "qcow2" } else { "img" };
        let path = |disk: &str| folder.join(format!("{disk}.{suffix}"));
        let names: Vec<_> = head.disks.iter().map(|disk| &*disk.name).collect();
        // Before hours are spent on the others.
        if let Some(path) =
            names.iter().map(|disk| path(disk)).find(|it| it.symlink_metadata().is_ok())
        {
            return Err(JobError::destination(format!(
                "'{}' exists already; give another folder, or restore the other disks one by one, as \
                 {}@{id}#DISK",
                path.display(),
                head.name
            )));
        }
        // It stays, whatever becomes of the backup between two disks.
        let first = names.first().copied();
        let pinned = self.repository.read_disk(id, first, Damage::Refused).await;
        let pinned = pinned.map_err(repository_error)?;
        let mut restored = Ok(None);
        for disk in names {
            restored =
                match (restored, self.disk((id, Some(disk)), &Location::File(path(disk))).await) {
                    (Ok(sum), Ok(one)) => Ok(Some(added(sum, one))),
                    (_, Err(error)) | (Err(error), _) => Err(error),
                };
            if restored.is_err() {
                break;
            }
        }
        pinned.close().await;
        restored?.ok_or_else(|| JobError::source(format!("the backup {id} has no disk")))
    }

    /// Restores a disk.
    async fn disk(
        &self,
        (id, disk): (Id, Option<&str>),
        to: &Location,
    ) -> Result<Restored, JobError> {
        let damage = match self.skip_damaged {
            false => Damage::Refused,
            true => {
                let damaged = Arc::clone(&self.damaged);
                Damage::Told(Arc::new(move |_, error| {
                    if damaged.fetch_add(1, Ordering::Relaxed) < NAMED_MAX {
                        warn(&error.to_string());
                    }
                }))
            }
        };
        let opened = self.repository.read_disk(id, disk, damage).await;
        let storage = Arc::new(opened.map_err(repository_error)?);
        // What the disk holds is never taken for an image.
        let raw = OpenOptions::new().format(Format::Raw);
        let image: Arc<dyn Storage> = Arc::clone(&storage) as _;
        let restored = match Image::from_storage(image, &raw) {
            Ok(image) => restore_image(image, &self.name, to, &self.options, self.context).await,
            Err(error) => Err(JobError::image(JobErrorKind::Source, error)),
        };
        // Reads that were given up may still hold it.
        storage.close().await;
        restored
    }
}

/// Adds what was restored of one disk to what was of others.
fn added(sum: Option<Restored>, one: Restored) -> Restored {
    let Some(mut sum) = sum else { return one };
    sum.size = sum.size.saturating_add(one.size);
    sum.copied += one.copied;
    sum.zero += one.zero;
    sum.verified = sum.verified.zip(one.verified).map(|(sum, one)| sum + one);
    sum
}
