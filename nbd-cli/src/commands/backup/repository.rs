//! Backups in a repository.

use std::ffi::OsString;
use std::sync::Arc;

use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::remote::Remotes;
use nbd_jobs::repository::{
    BackedUpToRepository, DiskToBackUp, RepositoryOptions, backup_to_repository,
};
use nbd_jobs::size::rounded;
use nbd_jobs::{BackupSource, Cancellation, JobContext};
use nbd_proto::NbdUri;
use serde::Serialize;

use super::args::BackupArgs;
use crate::async_runtime::runtime;
use crate::commands::repo::open;
use crate::error::{CommandError, Outcome};
use crate::locking::advise_sharing;
use crate::output::{Output, ReportFormat, printable};
use crate::shown::Shown;

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

/// Makes the backup. `cancelled` catches signals; it needs the runtime.
pub(super) fn run(
    args: &BackupArgs,
    cancelled: fn() -> Result<Cancellation, CommandError>,
) -> Result<Outcome, CommandError> {
    let (disk, repository) = operands(args)?;
    let shown = Shown::new(args.summary.visibility());
    let runtime = runtime()?;
    let work = async {
        let cancellation = cancelled()?;
        let opened = open(&repository, &args.repository.passphrase).await?;
        let context =
            JobContext { observer: shown.clone(), cancellation, rate_limit: args.rate.limit() };
        Ok::<_, CommandError>(backup_to_repository(&disk, &opened, &options(args), &context).await?)
    };
    let result = runtime.block_on(work);
    shown.clear();
    let made = result?;
    if let Some(format) = args.summary.format() {
        report(args, &repository, &made).print(format)?;
    }
    Ok(Outcome::Success)
}

/// Returns the disk and the repository.
fn operands(args: &BackupArgs) -> Result<(DiskToBackUp, OsString), CommandError> {
    let (source, repository) = match (&args.second_operand, &args.control) {
        (Some(repository), _) => (Some(&args.first_operand), repository),
        (None, Some(_)) => (None, &args.first_operand),
        (None, None) => {
            return Err(CommandError::new(
                "give the disk, as an NBD URI or an image, and the repository; or --control and the \
                 repository",
            ));
        }
    };
    let uri = match source {
        Some(source) => source.to_str().and_then(|text| text.parse::<NbdUri>().ok()),
        None => None,
    };
    if let Some(socket) = &args.control {
        if let (Some(source), None) = (source, &uri) {
            return Err(CommandError::new(format!(
                "'{}' is not an NBD URI of a disk; with --control, give the URI or leave it out",
                printable(&source.to_string_lossy())
            )));
        }
        let (socket, export) = (socket.clone(), args.export.clone().unwrap_or_default());
        let disk = DiskToBackUp::Served(Box::new(BackupSource::Checkpoint { socket, export, uri }));
        return Ok((disk, repository.clone()));
    }
    if let Some(uri) = uri {
        args.tls.check([&uri])?;
        let disk = DiskToBackUp::Served(Box::new(BackupSource::Export(uri)));
        return Ok((disk, repository.clone()));
    }
    let source = source.ok_or_else(|| CommandError::new("give the disk"))?;
    let location = ImageLocation::parse(source)?;
    let options = args.share.apply(args.trust().options());
    let remotes = Remotes::default().objects(args.repository.passphrase.objects.opener());
    let image = location.open(&options, &remotes).map_err(advise_sharing)?;
    Ok((DiskToBackUp::Image(Arc::new(image)), repository.clone()))
}

fn options(args: &BackupArgs) -> RepositoryOptions {
    let mut options = RepositoryOptions::default();
    options.connect = args.connection.options(&args.tls);
    options.requests = args.requests.unwrap_or(options.requests);
    options.name = args.repository.name.clone().unwrap_or_default();
    options.bitmap.clone_from(&args.bitmap);
    options.full = args.repository.full;
    options.like.clone_from(&args.repository.like);
    options.verify = args.verified();
    options
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
