//! `nbd-cli restore`: a backup, or any other image, to a file, a device or a server.

#[cfg(feature = "object-storage")]
pub mod from_repository;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use imgfmt::Access;
use nbd_jobs::size::rounded;
use nbd_jobs::{
    DescribedLocation, JobContext, JobErrorKind, Location, RestoreCheck as Check, RestoreOptions,
    Verify,
};
use serde::Serialize;

use super::image::open::OpenArgs;
use crate::async_runtime::block_on;
use crate::connect::{ConnectionArgs, TlsArgs};
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::image_format::{RestoredFormat, name_of_another_format};
use crate::location_parser::LocationParser;
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, printable, warn};
use crate::progress::{RateArgs, SummaryArgs};
use crate::shown::Shown;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli restore monday.qcow2 disk.img
  nbd-cli restore --output-format qcow2 monday.qcow2 disk.qcow2
  nbd-cli restore --verify monday.qcow2 /dev/vg/disk
  nbd-cli restore monday.qcow2 nbd://vmhost/disk
  nbd-cli restore monday.qcow2 null:
  nbd-cli restore backup:/srv/backups/vm1@latest disk.img

The newest file of a chain represents the whole disk. A file as the destination must not exist yet:
it grows as NAME.partial, is renamed when it is complete, and is removed if the restore fails or is
interrupted (after kill -9 NAME.partial is left). A device or a server's disk is overwritten and
must be at least as large; a device is marked as incomplete until everything is written.
'nbd-cli backup' records a checksum of the data in each file. All files of the chain must still hold
that data; 'null:' as the destination checks them and writes nothing.";

/// Arguments of `nbd-cli restore`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RestoreArgs {
    /// The image to restore: the newest file of a chain of backups, or a backup in a repository, as
    /// backup:REPOSITORY/NAME@latest, @2026-11-20 (the newest of this day, in UTC),
    /// @2026-11-20T18:30 (the newest before) or @ID, and #DISK after that for one of several
    /// disks.
    #[arg(value_parser = FilePathParser)]
    pub image: PathBuf,

    /// A new file, a block device or an NBD URI; null: only reads and checks the image. All disks
    /// of a backup of several go to a folder, which exists, as DISK.img or DISK.qcow2.
    #[arg(value_parser = LocationParser)]
    pub destination: DescribedLocation,

    /// Format of the new file, or of the image on a device.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    pub output_format: RestoredFormat,

    /// Read both sides again at the end and compare checksums.
    #[arg(long)]
    pub verify: bool,

    /// Restore files even if their data does not match the recorded checksums.
    #[arg(long)]
    pub no_check: bool,

    #[cfg(feature = "object-storage")]
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub repository: from_repository::RepositoryArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub connection: ConnectionArgs,

    /// Requests in flight.
    #[arg(short = 'R', long, value_name = "N", default_value = "32")]
    pub requests: NonZeroUsize,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    /// The options for opening the image.
    #[command(flatten)]
    pub open: OpenArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub rate: RateArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub summary: SummaryArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub tls: TlsArgs,
}

/// The result of a restore. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct RestoreReport {
    image: String,
    destination: String,
    size: u64,
    copied: u64,
    zero: u64,
    /// Bytes compared, if the restore was verified.
    verified: Option<u64>,
    /// Number of files of the chain whose data matches the recorded checksums.
    checked: usize,
    /// Number of files of the chain without a recorded checksum.
    unchecked: usize,
    seconds: f64,
}

pub(crate) fn run(args: &RestoreArgs) -> Result<Outcome, CommandError> {
    args.connection.check(args.requests)?;
    args.tls.check(args.destination.location.uri())?;
    if let Location::File(path) = &args.destination.location
        && let Some(why) =
            name_of_another_format(path, args.output_format.into(), "--output-format")
    {
        warn(&why);
    }
    let report = block_on(restore(args))?;
    if let Some(format) = args.summary.format() {
        report.print(format)?;
    }
    Ok(Outcome::Success)
}

async fn restore(args: &RestoreArgs) -> Result<RestoreReport, CommandError> {
    let started = Instant::now();
    let shown = Shown::new(args.summary.visibility());
    let (from, to) = (&args.image, &args.destination.location);
    let context = JobContext { rate_limit: args.rate.limit(), ..shown.context() };
    #[cfg(feature = "object-storage")]
    let result = match from_repository::address(from) {
        Some(address) => from_repository::restore(args, address, options(args)?, &context).await?,
        None => nbd_jobs::restore(from, to, &options(args)?, &context).await,
    };
    #[cfg(not(feature = "object-storage"))]
    let result = nbd_jobs::restore(from, to, &options(args)?, &context).await;
    shown.clear();
    let restored = result.map_err(|error| match error.kind() {
        JobErrorKind::Source => advise_sharing(error),
        _ => error.into(),
    })?;
    Ok(RestoreReport {
        image: args.image.display().to_string(),
        destination: match &args.destination.location {
            Location::File(path) => path.display().to_string(),
            other => other.to_string(),
        },
        size: restored.size,
        copied: restored.copied,
        zero: restored.zero,
        verified: restored.verified,
        checked: restored.checked,
        unchecked: restored.unchecked,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Returns the options of the job.
fn options(args: &RestoreArgs) -> Result<RestoreOptions, CommandError> {
    let mut options = RestoreOptions::default();
    options.connect = args.connection.options(&args.tls);
    options.requests = args.requests;
    options.image = args.share.apply(args.open.options());
    options.format = args.output_format.into();
    let locking = args.open.trust.locks.locking();
    options.destination_locking = args.destination.locking(Access::ReadWrite, locking)?;
    options.verify = if args.verify { Verify::All } else { Verify::Nothing };
    options.check = if args.no_check { Check::Off } else { Check::Recorded };
    Ok(options)
}

impl RestoreReport {
    fn print(&self, format: ReportFormat) -> Result<(), CommandError> {
        let mut output = Output::new();
        match format {
            ReportFormat::Json => output.json(self)?,
            ReportFormat::Text => {
                let verified = match self.verified {
                    Some(bytes) => format!(", {} verified", rounded(bytes)),
                    None => String::new(),
                };
                let checked = match self.checked {
                    0 => String::new(),
                    files => format!(", {files} of {} files as recorded", files + self.unchecked),
                };
                output.line(&format!(
                    "{}: {} in {:.1} s: {} copied, {} zero{checked}{verified}",
                    printable(&self.destination),
                    rounded(self.size),
                    self.seconds,
                    rounded(self.copied),
                    rounded(self.zero),
                ))?;
            }
        }
        output.finish()
    }
}
