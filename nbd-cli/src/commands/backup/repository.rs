//! Backups in a repository.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::remote::Remotes;
use nbd_jobs::repository::{
    BackedUpToRepository, DiskToBackUp, NamedDisk, RepositoryOptions, backup_disks_to_repository,
    backup_to_repository, repository_error,
};
use nbd_jobs::serving::split_name;
use nbd_jobs::size::rounded;
use nbd_jobs::{BackupSource, JobContext};
use nbd_objects::repo::BackupName;
use nbd_proto::NbdUri;
use serde::Serialize;

use super::args::BackupArgs;
use crate::async_runtime::block_on;
use crate::commands::repo::open;
use crate::error::{CommandError, Outcome};
use crate::locking::advise_sharing;
use crate::output::{Output, ReportFormat, printable};
use crate::shown::Shown;
use crate::signals;

/// The result. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    repository: String,
    name: String,
    id: String,
    /// The backup on which it was built.
    base: Option<String>,
    /// Whether only the dirty parts were read.
    incremental: bool,
    size: u64,
    read: u64,
    added: u64,
    verified: Option<u64>,
    seconds: f64,
}

/// Makes the backup.
pub(super) fn run(args: &BackupArgs) -> Result<Outcome, CommandError> {
    let options = options(args)?;
    let (disks, repository) = disks(args)?;
    let shown = Shown::new(args.summary.visibility());
    signals::watch()?;
    let context = JobContext { rate_limit: args.rate.limit(), ..shown.context() };
    let work = async {
        let opened = open(&repository, &args.repository.passphrase).await?;
        let made = match &disks {
            Disks::One(disk) => backup_to_repository(disk, &opened, &options, &context).await,
            Disks::Several(disks) => {
                backup_disks_to_repository(disks, &opened, &options, &context).await
            }
        };
        Ok::<_, CommandError>(made?)
    };
    let result = block_on(work);
    shown.clear();
    let made = result?;
    if let Some(format) = args.summary.format() {
        report(args, &repository, &made).print(format)?;
    }
    Ok(Outcome::Success)
}

/// What is backed up.
enum Disks {
    One(Box<DiskToBackUp>),
    Several(Vec<NamedDisk>),
}

/// Returns the disks and the repository.
fn disks(args: &BackupArgs) -> Result<(Disks, OsString), CommandError> {
    let mut operands = vec![&args.first_operand];
    operands.extend(args.second_operand.iter().chain(&args.more_operands));
    let repository = operands.pop().unwrap_or(&args.first_operand).clone();
    let split: Vec<_> = operands.iter().map(|operand| split_name(operand)).collect();
    if !split.iter().any(|(name, _)| name.is_some()) {
        return match operands[..] {
            [] => one(args, None),
            [source] => one(args, Some(source)),
            _ => Err(CommandError::new("several disks are given as DISK=SOURCE")),
        }
        .map(|disk| (Disks::One(Box::new(disk)), repository));
    }
    if args.export.is_some() {
        return Err(CommandError::new("give the export as DISK=EXPORT, or by --export: not both"));
    }
    let mut disks = Vec::new();
    for (name, source) in split {
        let Some(name) = name else {
            return Err(CommandError::new(format!(
                "'{}' has no name; if one disk has one, all are given as DISK=SOURCE",
                printable(&source.to_string_lossy())
            )));
        };
        let disk = match &args.control {
            Some(socket) => {
                let export = source
                    .to_str()
                    .ok_or_else(|| CommandError::new("the name of the export is not UTF-8"))?;
                let (socket, export) = (socket.clone(), export.to_owned());
                let source = BackupSource::Checkpoint { socket, export, uri: None };
                DiskToBackUp::Served(Box::new(source))
            }
            None => disk(args, source)?,
        };
        disks.push(NamedDisk::new(name, disk));
    }
    Ok((Disks::Several(disks), repository))
}

/// Returns the only disk.
fn one(args: &BackupArgs, source: Option<&OsString>) -> Result<DiskToBackUp, CommandError> {
    let Some(socket) = &args.control else {
        let source = source.ok_or_else(|| {
            CommandError::new(
                "give the disk, as an NBD URI or an image, and the repository; or --control and the \
                 repository",
            )
        })?;
        return disk(args, source);
    };
    args.check_export()?;
    let uri = match source {
        None => None,
        Some(source) => Some(uri(source).ok_or_else(|| {
            CommandError::new(format!(
                "'{}' is not an NBD URI of a disk; with --control, give the URI or leave it out",
                printable(&source.to_string_lossy())
            ))
        })?),
    };
    let (socket, export) = (socket.clone(), args.export.clone().unwrap_or_default());
    Ok(DiskToBackUp::Served(Box::new(BackupSource::Checkpoint { socket, export, uri })))
}

fn uri(source: &OsStr) -> Option<NbdUri> {
    source.to_str()?.parse().ok()
}

/// Returns a disk: an NBD URI or an image.
fn disk(args: &BackupArgs, source: &OsStr) -> Result<DiskToBackUp, CommandError> {
    if let Some(uri) = uri(source) {
        args.tls.check([&uri])?;
        return Ok(DiskToBackUp::Served(Box::new(BackupSource::Export(uri))));
    }
    let location = ImageLocation::parse(source)?;
    let options = args.share.apply(args.trust().options());
    let remotes = Remotes::default().objects(args.repository.passphrase.objects.opener());
    let image = location.open(&options, &remotes).map_err(advise_sharing)?;
    Ok(DiskToBackUp::Image(Arc::new(image)))
}

fn options(args: &BackupArgs) -> Result<RepositoryOptions, CommandError> {
    let name = args.repository.name.as_deref().unwrap_or_default();
    let mut options = RepositoryOptions::new(BackupName::parse(name).map_err(repository_error)?);
    options.connect = args.connection.options(&args.tls);
    options.requests = args.requests.unwrap_or(options.requests);
    options.bitmap.clone_from(&args.bitmap);
    options.full = args.repository.full;
    options.like.clone_from(&args.repository.like);
    options.verify = args.verified();
    Ok(options)
}

fn report(args: &BackupArgs, repository: &OsString, made: &BackedUpToRepository) -> Report {
    Report {
        repository: repository.to_string_lossy().into_owned(),
        name: args.repository.name.clone().unwrap_or_default(),
        id: made.id.to_string(),
        base: made.base.map(|id| id.to_string()),
        incremental: made.is_incremental,
        size: made.size,
        read: made.read,
        added: made.added,
        verified: made.verified,
        seconds: made.took.as_secs_f64(),
    }
}

impl Report {
    fn print(&self, format: ReportFormat) -> Result<(), CommandError> {
        let mut output = Output::new();
        match format {
            ReportFormat::Json => output.json(self)?,
            ReportFormat::Text => {
                let kind = if self.incremental { "incremental" } else { "full" };
                let verified = match self.verified {
                    Some(bytes) => format!(", {} verified", rounded(bytes)),
                    None => String::new(),
                };
                output.line(&format!(
                    "{}@{}: {kind}, {} in {:.1} s: {} read, {} added{verified}",
                    printable(&self.name),
                    self.id,
                    rounded(self.size),
                    self.seconds,
                    rounded(self.read),
                    rounded(self.added),
                ))?;
            }
        }
        output.finish()
    }
}
