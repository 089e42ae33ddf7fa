//! `nbd-cli image compare`.

use std::ffi::OsString;
use std::io::Write as _;
use std::num::NonZeroUsize;

use clap::Args;
use imgfmt::jobs::{self, CompareOptions};
use nbd_jobs::image_location::ImageLocation;
use serde::Serialize;

use super::location;
use super::open::{TrustArgs, options};
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::ImageFormat;
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, unless_closed, warn};
use crate::progress::ProgressArgs;
use crate::shown::Shown;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image compare disk.img disk.qcow2
  nbd-cli image compare --strict --json backup.qcow2 disk.qcow2
  nbd-cli image compare backup.qcow2 nbd://localhost/disk

The disks are compared as a guest would see them, backing files included. If one is larger, the rest
of it must be zero. Ranges that a server reports as zero are not read.

Exit codes: 0 the same, 1 different, 2 an error, including wrong usage.";

const DIFFERENT: u8 = 1;
const ERROR: u8 = 2;

/// Bytes of each disk that a thread compares at a time if a server is involved: its answers take
/// longer.
const REMOTE_REQUEST_SIZE: NonZeroUsize = NonZeroUsize::new(1 << 20).expect("it is not zero");
/// Number of threads if a server is involved: most of them wait.
const REMOTE_THREADS: NonZeroUsize = NonZeroUsize::new(8).expect("it is not zero");

/// Arguments of `nbd-cli image compare`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CompareArgs {
    /// An image: a file, or an export as an NBD URI.
    pub first: OsString,

    /// Another image, or an export as an NBD URI.
    pub second: OsString,

    /// Format of the first image; detected unless given.
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub format: Option<ImageFormat>,

    /// Format of the second image; detected unless given.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub second_format: Option<ImageFormat>,

    /// Treat disks of different sizes as different, even if the rest is zero.
    #[arg(short, long)]
    pub strict: bool,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub progress: ProgressArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    #[command(flatten)]
    pub trust: TrustArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct CompareReport {
    identical: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    mismatch_offset: Option<u64>,
    size_mismatch: bool,
}

pub(crate) fn run(args: &CompareArgs) -> Result<Outcome, CommandError> {
    compare(args).or_else(|error| {
        // Exit code 1 would mean that the images differ.
        let _ = writeln!(std::io::stderr(), "nbd-cli: {error}");
        Ok(Outcome::Status(ERROR))
    })
}

fn print(report: &CompareReport, sizes: &str, format: ReportFormat) -> Result<(), CommandError> {
    let mut output = Output::new();
    match format {
        ReportFormat::Json => output.json(report)?,
        ReportFormat::Text => {
            match report.mismatch_offset {
                Some(offset) => output.line(&format!("the disks differ at offset {offset}"))?,
                None if report.identical => output.line("the disks are the same")?,
                None => output.line(&format!("the disks have different sizes: {sizes}"))?,
            }
            if report.size_mismatch && report.identical {
                warn(&format!("the disks have {sizes}; the rest of the larger one is zero"));
            }
        }
    }
    output.finish()
}

fn compare(args: &CompareArgs) -> Result<Outcome, CommandError> {
    let locations = location::parse_two([&args.first, &args.second], &args.server, &args.trust)?;
    let is_remote = locations.iter().any(|location| location.is_remote());
    let [first, second] = locations;
    let open = |location: &ImageLocation, format, raw_option| {
        let options = args.share.apply(options(format, &args.trust));
        let options = options.policy(args.trust.policy_with(&args.server));
        location.open_or_name(&options, &args.server.remotes(), raw_option).map_err(advise_sharing)
    };
    let first = open(&first, args.format, "--format raw")?;
    let second = open(&second, args.second_format, "--second-format raw")?;
    let size_mismatch = first.size() != second.size();
    let mismatch_offset = if size_mismatch && args.strict {
        None
    } else {
        let mut options = CompareOptions::default();
        if is_remote {
            (options.request_size, options.threads) = (REMOTE_REQUEST_SIZE, REMOTE_THREADS);
        }
        let shown = Shown::new(args.progress.visibility());
        let compared = jobs::compare(&first, &second, &options, &shown.context().for_images());
        shown.clear();
        compared?.first_difference
    };
    let identical = mismatch_offset.is_none() && !(size_mismatch && args.strict);
    let report = CompareReport { identical, mismatch_offset, size_mismatch };
    let sizes = format!("{} and {} bytes", first.size(), second.size());
    unless_closed(print(&report, &sizes, ReportFormat::from_json_flag(args.json)))?;
    Ok(if identical { Outcome::Success } else { Outcome::Status(DIFFERENT) })
}
