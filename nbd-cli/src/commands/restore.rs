//! `nbd-cli restore`: a backup, or any other image, to a file, a device or a server.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use clap::Args;
use imgfmt::{
    Access, CreateOptions, Format, Image, NewOnDevice, OpenOptions, OpenPolicy, Unfinished,
};
use nbd_client::ZeroMode;
use nbd_jobs::JobContext;
use nbd_jobs::Knowledge;
use nbd_jobs::Location;
use nbd_jobs::copy::again;
use nbd_jobs::copy::destination::{Destination, Surface, create_empty};
use nbd_jobs::copy::job::{Job, Settings, ZeroPolicy};
use nbd_jobs::copy::source::Source;
use nbd_jobs::copy::verify::Verification;
use nbd_jobs::target::{self, Durable, Existing, NewFile, device};
use serde::Serialize;

use super::image::open::OpenArgs;
use crate::connect::{ConnectionArgs, TlsArgs};
use crate::error::{CommandError, Outcome, block_on};
use crate::image_format::ImageFormat;
use crate::location_parser::LocationParser;
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, printable};
use crate::progress::Visibility;
use crate::shown::Shown;
use crate::size::rounded;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli restore monday.qcow2 disk.img
  nbd-cli restore --output-format qcow2 monday.qcow2 disk.qcow2
  nbd-cli restore --verify monday.qcow2 /dev/vg/disk
  nbd-cli restore monday.qcow2 nbd://vmhost/disk

The newest file of a chain stands for the whole disk. A file as the destination must not exist yet:
it grows as NAME.partial, gets its name when it is complete, and is removed if the restore fails or
is interrupted (after kill -9 NAME.partial is left). A device or a server's disk is overwritten and
must be at least as large; a device is marked as incomplete until everything is on it.";

/// Size of a request, in bytes.
const REQUEST_SIZE: u64 = 512 << 10;
/// Unit in which zeroes are looked for, and a multiple of what qcow2 needs, in bytes.
const CLUSTER_SIZE: u64 = 64 << 10;

/// Arguments of `nbd-cli restore`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RestoreArgs {
    /// The image to restore: the newest file of a chain of backups.
    pub image: PathBuf,

    /// A new file, a block device or an NBD URI.
    #[arg(value_parser = LocationParser)]
    pub destination: Location,

    /// Format of a new file, or on a device.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    pub output_format: ImageFormat,

    /// Read both sides again at the end and compare checksums.
    #[arg(long)]
    pub verify: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub connection: ConnectionArgs,

    /// Requests in flight.
    #[arg(short = 'R', long, value_name = "N", default_value = "32")]
    pub requests: NonZeroUsize,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    /// How the image is opened.
    #[command(flatten)]
    pub open: OpenArgs,

    /// Print the summary as JSON.
    #[arg(long)]
    pub json: bool,

    /// Show progress even if standard error is not a terminal.
    #[arg(short, long)]
    pub progress: bool,

    /// Show no progress and no summary.
    #[arg(short, long, conflicts_with_all = ["progress", "json"])]
    pub quiet: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub tls: TlsArgs,
}

/// What a restore did. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    image: String,
    destination: String,
    size: u64,
    copied: u64,
    zero: u64,
    /// How much was compared, if anything was.
    verified: Option<u64>,
    seconds: f64,
}

pub(crate) fn run(args: &RestoreArgs) -> Result<Outcome, CommandError> {
    if args.requests.get() > 4096 || args.connection.connections.get() > 256 {
        return Err(CommandError::new(
            "--requests is limited to 4096 and --connections to 256; give smaller numbers",
        ));
    }
    args.tls.check(args.destination.uri())?;
    let report = block_on(restore(args))?;
    if !args.quiet {
        report.print(ReportFormat::from_json_flag(args.json))?;
    }
    Ok(Outcome::Success)
}

async fn restore(args: &RestoreArgs) -> Result<Report, CommandError> {
    let started = Instant::now();
    let image = Arc::new(args.open.read(&args.image, args.share).map_err(advise_sharing)?);
    let is_new = match &args.destination {
        Location::File(path) => is_new(path)?,
        Location::Nbd(_) => false,
        Location::Standard | Location::Null => {
            return Err(CommandError::new(
                "a backup is restored to a file, a device or an NBD URI",
            ));
        }
    };
    if is_image(args) && matches!(args.destination, Location::Nbd(_)) {
        return Err(CommandError::new(
            "--output-format qcow2 is for files and devices; a server gets the disk as it is",
        ));
    }
    let source = Source::image(image);
    let size = source.size().unwrap_or_default();
    let shown = Shown::new(visibility(args));
    let context = shown.context();
    let mut new = New::begin(args, size, is_new, &context)?;
    let result = match open(args, &source, &mut new, &context).await {
        Ok(destination) => fill_and_verify(args, source, destination, &new, &context).await,
        Err(error) => Err(error),
    };
    shown.clear();
    let ([copied, zero], verified) = result.map_err(|error| failure(args, &new, &error))?;
    new.complete(args)?;
    Ok(Report {
        image: args.image.display().to_string(),
        destination: match &args.destination {
            Location::File(path) => path.display().to_string(),
            other => other.to_string(),
        },
        size,
        copied,
        zero,
        verified,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Whether the result is an image rather than the disk itself.
fn is_image(args: &RestoreArgs) -> bool {
    args.output_format == ImageFormat::Qcow2
}

/// What becomes valid when the restore is complete.
enum New {
    File(NewFile),
    /// An image on a device.
    Image(NewOnDevice),
    /// A raw disk on a device.
    Disk(Arc<Unfinished>),
    /// A server's disk shows what is written to it.
    Nothing,
}

impl New {
    fn begin(
        args: &RestoreArgs,
        size: u64,
        is_new: bool,
        context: &JobContext,
    ) -> Result<Self, CommandError> {
        match &args.destination {
            Location::File(path) if is_new => {
                Ok(Self::File(NewFile::begin(path, &context.observer, |path| {
                    make(args, size, path)
                })?))
            }
            Location::File(device) if is_image(args) => {
                let options = CreateOptions::new(Format::Qcow2, size);
                Ok(Self::Image(device::begin_image(device, &options, &*context.observer)?))
            }
            // A raw device is found to be one when it is opened.
            _ => Ok(Self::Nothing),
        }
    }

    fn complete(self, args: &RestoreArgs) -> Result<(), CommandError> {
        match (self, &args.destination) {
            (Self::File(new), _) => Ok(new.complete(Durable::Now)?),
            (Self::Image(new), Location::File(path)) => Ok(device::complete_image(path, new)?),
            (Self::Disk(disk), Location::File(path)) => Ok(device::complete_disk(path, &disk)?),
            _ => Ok(()),
        }
    }
}

/// The error with what it leaves.
fn failure(args: &RestoreArgs, new: &New, error: &CommandError) -> CommandError {
    let failed = CommandError::new(format!("restoring '{}' failed: {error}", args.image.display()));
    let left = match (new, &args.destination) {
        (New::File(new), _) => new.left_behind(),
        (New::Image(_), Location::File(device)) => device::left_behind(device),
        (New::Disk(disk), Location::File(device)) => device::left_behind_on(device, disk),
        _ => format!("{} is incomplete", args.destination),
    };
    CommandError::new(format!("{failed}; {left}"))
}

/// Whether there is nothing of that name; a device may be there.
fn is_new(path: &Path) -> Result<bool, CommandError> {
    match target::look(path)? {
        Existing::Nothing => Ok(true),
        Existing::BlockDevice => Ok(false),
        Existing::File => Err(CommandError::new(format!(
            "'{}' exists already; give the name of a new file",
            path.display()
        ))),
    }
}

/// Makes the new file, with nothing in it yet.
fn make(args: &RestoreArgs, size: u64, path: &Path) -> Result<(), CommandError> {
    match args.output_format {
        ImageFormat::Qcow2 => Ok(Image::create(path, &CreateOptions::new(Format::Qcow2, size))?),
        _ => Ok(create_empty(path)?),
    }
}

async fn open(
    args: &RestoreArgs,
    source: &Source,
    new: &mut New,
    context: &JobContext,
) -> Result<Destination, CommandError> {
    let options = plain(Format::Qcow2).access(Access::ReadWrite);
    match new {
        New::File(new) if is_image(args) => {
            Ok(Destination::image(Image::open(new.path(), &options)?, Surface::Zeroes))
        }
        New::File(new) => Ok(Destination::new_file(new)?),
        New::Image(new) => Ok(Destination::image(new.open(&options)?, Surface::Zeroes)),
        New::Disk(_) | New::Nothing => {
            let (to, connect) = (&args.destination, args.connection.options(&args.tls));
            let locking = args.open.trust.locks.locking();
            let opened = Destination::open(to, &connect, locking, source, context).await?;
            if let Some(disk) = opened.device() {
                *new = New::Disk(disk);
            }
            Ok(opened)
        }
    }
}

/// An image that stands alone.
fn plain(format: Format) -> OpenOptions {
    OpenOptions::new().format(format).policy(OpenPolicy::deny())
}

async fn fill_and_verify(
    args: &RestoreArgs,
    source: Source,
    destination: Destination,
    new: &New,
    context: &JobContext,
) -> Result<([u64; 2], Option<u64>), CommandError> {
    let Source::Image { image, .. } = &source else {
        return Err(CommandError::new("only an image can be restored"));
    };
    let image = image.clone();
    let zeroes = match destination.is_zero() {
        true => ZeroPolicy::Skip,
        false => ZeroPolicy::Write(ZeroMode::MayPunch),
    };
    let is_image = matches!(destination, Destination::Image { .. });
    let unit = destination.alignment();
    let settings = Settings {
        requests: args.requests.get(),
        request_size: REQUEST_SIZE,
        unit: if is_image { CLUSTER_SIZE } else { unit },
        zeroes,
        sparse: Some(if is_image { CLUSTER_SIZE } else { unit.max(4096) }),
        start: 0,
    };
    let extents = source.extents(0);
    let job = Arc::new(Job::new(&settings, source, destination, extents, context));
    // A server that cannot flush has nothing better to offer.
    let flushes = match &job.destination {
        Destination::Nbd { client, .. } => {
            client.info().flags.contains(nbd_proto::wire::TransmissionFlags::SEND_FLUSH)
        }
        _ => true,
    };
    again::run(&job, flushes).await?;
    let counts = [&job.counts().data, &job.counts().zero].map(|n| n.load(Ordering::Relaxed));
    let job = Arc::into_inner(job)
        .ok_or_else(|| CommandError::new("a task of the restore has not ended"))?;
    job.destination.close().await;
    job.destination.close_image()?;
    let verified = match args.verify {
        true => Some(verify(args, new, image, context).await?),
        false => None,
    };
    Ok((counts, verified))
}

async fn verify(
    args: &RestoreArgs,
    new: &New,
    image: Arc<Image>,
    context: &JobContext,
) -> Result<u64, CommandError> {
    let locking = args.open.trust.locks.locking();
    let connect = args.connection.options(&args.tls);
    let written =
        async |place| Source::open(place, &connect, locking, Knowledge::Holes, context).await;
    let copy = match new {
        New::File(new) if is_image(args) => {
            Source::image(Arc::new(Image::open(new.path(), &plain(Format::Qcow2))?))
        }
        New::File(new) => written(&Location::File(new.path().to_owned())).await?,
        New::Image(new) => Source::image(Arc::new(new.open(&plain(Format::Qcow2))?)),
        New::Disk(disk) => {
            Source::image(Arc::new(Image::from_storage(disk.clone(), &plain(Format::Raw))?))
        }
        New::Nothing => written(&args.destination).await?,
    };
    let unit = copy.alignment();
    let source = Source::image(image);
    let extents = source.extents(0);
    let verification = Arc::new(Verification::new(source, copy, unit, extents, context));
    let result = verification.run(args.requests.get()).await;
    verification.copy.close().await;
    Ok(result?)
}

fn visibility(args: &RestoreArgs) -> Visibility {
    match (args.progress, args.quiet) {
        (true, _) => Visibility::Always,
        (_, true) => Visibility::Never,
        _ => Visibility::IfTerminal,
    }
}

impl Report {
    fn print(&self, format: ReportFormat) -> Result<(), CommandError> {
        let mut output = Output::new();
        match format {
            ReportFormat::Json => output.json(self)?,
            ReportFormat::Text => {
                let verified = match self.verified {
                    Some(bytes) => format!(", {} verified", rounded(bytes)),
                    None => String::new(),
                };
                output.line(&format!(
                    "{}: {} in {:.1} s: {} copied, {} zero{verified}",
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
