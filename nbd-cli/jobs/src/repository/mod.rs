//! Backups of disks in a repository on an object store or in a folder (feature `object-storage`).

mod checkpoint;
mod disk;
mod export;
mod identity;
mod import;
mod job;
mod options;
mod several;

use std::sync::Arc;

use nbd_objects::repo::{DiskOrigin, Head, Id, Repository};
use nbd_proto::NbdUri;

pub use self::disk::{open_disk, split_address};
pub use self::export::{Exported, export_from_repository};
pub use self::import::{ImportOptions, Imported, import_to_repository};
use self::job::{Described, Parts, Work};
use self::options::earlier;
pub use self::options::{BackedUpToRepository, DiskToBackUp, RepositoryOptions, repository_error};
pub use self::several::NamedDisk;
use crate::backup::BackupSource;
use crate::backup::checkpoint::Server;
use crate::copy::check_concurrency;
use crate::copy::source::Source;
use crate::error::{JobError, JobErrorKind};
use crate::observer::JobContext;
use crate::text::printable;

/// Makes a backup of a disk in a repository.
///
/// Every backup is complete: none needs another one. Only what the last backup of this name does
/// not have is sent. A backup that was interrupted is made again, and sends what is missing.
///
/// # Errors
///
/// If the disk or the repository cannot be reached, if the options contradict each other, if the
/// bitmap does not belong to the last backup, if verification finds a difference, and if the job is
/// cancelled.
///
/// # Cancel safety
///
/// Dropping the future leaves no backup, and packs that the next backup of this name uses again. A
/// checkpoint is rolled back by its server.
pub async fn backup_to_repository(
    disk: &DiskToBackUp,
    repository: &Repository,
    options: &RepositoryOptions,
    context: &JobContext,
) -> Result<BackedUpToRepository, JobError> {
    check_concurrency(options.requests, &options.connect)?;
    let earlier = earlier(repository, &options.name).await?;
    let last = earlier.first().cloned();
    let mut work = Work::new(repository, options, context, &earlier).await?;
    work.tell_missing(&earlier, &[]);
    match disk {
        DiskToBackUp::Image(image) => {
            if options.bitmap.is_some() {
                return Err(JobError::invalid(
                    "--bitmap is for disks of servers; serve the image, or leave it out",
                ));
            }
            let source = Source::image(Arc::clone(image));
            work.run(source, Parts::All, &Described::default()).await
        }
        DiskToBackUp::Served(served) => match &**served {
            BackupSource::Export(uri) => {
                options.connect.tls.check([uri])?;
                let dirty = match &options.bitmap {
                    Some(bitmap) if !options.full && last.is_some() => {
                        // Not the newest by the time in it: clocks are set back, and the newest may
                        // have been forgotten or damaged since.
                        let last = repository.last(&options.name).await;
                        let last = last.map_err(repository_error)?;
                        let base = earlier.iter().find(|(id, _)| Some(*id) == last);
                        work.start_with(uri, bitmap, base)?.then_some(bitmap.as_str())
                    }
                    _ => None,
                };
                let origin = DiskOrigin {
                    export: Some(uri.export_name.clone()),
                    bitmap: options.bitmap.clone(),
                    ..DiskOrigin::default()
                };
                let described = Described { origin, imported: None };
                work.run_served(uri, dirty, &described).await
            }
            BackupSource::Checkpoint { socket, export, uri } => {
                let server = Server { socket, export, uri: uri.as_ref() };
                checkpoint::backup(&mut work, server, &earlier).await
            }
        },
    }
}

/// Makes one backup of several disks in a repository: they are listed, forgotten and deleted as
/// one, and each can be read by itself.
///
/// Disks of one server with a control socket are backed up in their state at one moment. All others
/// are read one after the other, and must not change meanwhile. If one of them fails, there is no
/// backup.
///
/// # Errors
///
/// As [`backup_to_repository`]; if a name cannot be or two disks have the same, and if some are
/// checkpoints and others are not, or of different servers.
///
/// # Cancel safety
///
/// As [`backup_to_repository`].
pub async fn backup_disks_to_repository(
    disks: &[NamedDisk],
    repository: &Repository,
    options: &RepositoryOptions,
    context: &JobContext,
) -> Result<BackedUpToRepository, JobError> {
    check_concurrency(options.requests, &options.connect)?;
    several::check(disks)?;
    let earlier = earlier(repository, &options.name).await?;
    let mut work = Work::new(repository, options, context, &earlier).await?;
    work.tell_missing(&earlier, disks);
    let is_checkpoint = |disk: &NamedDisk| match &disk.disk {
        DiskToBackUp::Served(served) => matches!(**served, BackupSource::Checkpoint { .. }),
        DiskToBackUp::Image(_) => false,
    };
    if disks.iter().any(is_checkpoint) {
        return checkpoint::backup_together(&mut work, disks, &earlier).await;
    }
    let last = match &options.bitmap {
        Some(_) if !options.full && !earlier.is_empty() => {
            let last = repository.last(&options.name).await.map_err(repository_error)?;
            let found = earlier.iter().find(|(id, _)| Some(*id) == last);
            if found.is_none() {
                work.no_last();
            }
            found
        }
        _ => None,
    };
    if let Some((id, _)) = last {
        (work.base, work.follows) = (Some(*id), Some(*id));
    }
    let mut opened = Vec::new();
    for disk in disks {
        opened.push(several::open(&work, disk, last).await?);
    }
    several::place(&mut opened, work.base_in(&earlier))?;
    for disk in &mut opened {
        disk.dirty = several::follows(&work, &disk.head, last)?;
    }
    several::run(&work, opened).await
}

impl<'a> Work<'a> {
    async fn new(
        repository: &'a Repository,
        options: &'a RepositoryOptions,
        context: &'a JobContext,
        earlier: &[(Id, Head)],
    ) -> Result<Self, JobError> {
        let mut like = Vec::new();
        for name in &options.like {
            like.push(repository.find(name).await.map_err(repository_error)?.0);
        }
        let base = earlier.first().map(|it| it.0);
        let (base_size, follows, before_commit) = (None, None, None);
        Ok(Self { repository, options, context, like, base, base_size, follows, before_commit })
    }

    /// Tells which disks the last backup has and this one has not: it may be a slip.
    fn tell_missing(&self, earlier: &[(Id, Head)], disks: &[NamedDisk]) {
        let Some((_, last)) = earlier.first() else { return };
        let is_missing = |name: &str| !disks.iter().any(|disk| disk.name == name);
        let missing: Vec<_> =
            last.disks.iter().map(|disk| &*disk.name).filter(|name| is_missing(name)).collect();
        if !missing.is_empty() {
            self.context.observer.warning(&format!(
                "the last backup of '{}' has disks that this one has not: {}",
                printable(&self.options.name),
                printable(&missing.join(", "))
            ));
        }
    }

    /// What the base is.
    fn base_in<'b>(&self, earlier: &'b [(Id, Head)]) -> Option<&'b Head> {
        earlier.iter().find(|(id, _)| Some(*id) == self.base).map(|(_, head)| head)
    }

    /// Tells that no bitmap is used, because the last backup is not known.
    fn no_last(&self) {
        self.reads_all(&format!(
            "the last backup of '{}' may not be one with which a bitmap started: it was forgotten, \
             cannot be read, is not complete, or was made while another one was made",
            printable(&self.options.name)
        ));
    }

    /// Builds on the backup with which a bitmap started, if that is `last`: then only what is dirty
    /// is read.
    fn start_with(
        &mut self,
        uri: &NbdUri,
        bitmap: &str,
        last: Option<&(Id, Head)>,
    ) -> Result<bool, JobError> {
        let name = printable(&self.options.name);
        let Some((id, head)) = last else {
            self.no_last();
            return Ok(false);
        };
        check_bitmap(uri, bitmap, head)?;
        if head.origin.bitmap.is_none() {
            self.reads_all(&format!("the last backup of '{name}' was made without a bitmap"));
            return Ok(false);
        }
        (self.base, self.base_size, self.follows) = (Some(*id), Some(head.size), Some(*id));
        Ok(true)
    }
}

/// Refuses a bitmap or an export that is not the one of the last backup: it may be a slip.
fn check_bitmap(uri: &NbdUri, bitmap: &str, last: &Head) -> Result<(), JobError> {
    let origin = &last.origin;
    let why = if let Some(own) = origin.bitmap.as_deref().filter(|own| *own != bitmap) {
        format!("it was made for the bitmap '{}'", printable(own))
    } else if origin.export.as_ref() != Some(&uri.export_name) && origin.bitmap.is_some() {
        let own = origin.export.as_deref().unwrap_or_default();
        format!("it is of the export '{}'", printable(own))
    } else {
        return Ok(());
    };
    Err(JobError::new(
        JobErrorKind::Base,
        format!(
            "the last backup of '{}' may not be the one with which the bitmap '{}' started: {why}; \
             add --full to read the whole disk",
            printable(&last.name),
            printable(bitmap)
        ),
    ))
}
