//! `nbd-cli image check`.

use std::ffi::OsString;
use std::io::Write as _;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use imgfmt::{CheckReport, Error, ErrorKind, Format, Image, OpenOptions, OpenPolicy, Repair};
use nbd_jobs::image_location::{ImageLocation, connect_to};
use nbd_jobs::qemu_name::path_in;
use nbd_jobs::remote::Remotes;
use serde::Serialize;

use super::location;
use super::open::explained;
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::ImageFormat;
use crate::locking::{LockArgs, ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, printable, unless_closed};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image check disk.qcow2
  nbd-cli image check --repair leaks disk.qcow2
  nbd-cli image check --json disk.qcow2
  nbd-cli image check nbd://localhost/disk     an image in an export, as bytes

Only the image itself is checked, not its backing file, and not the guest's data in it. A leak is lost
space; a corruption endangers data: copy the image before you repair it. A repair does not change
readable data. Unreliable refcounts are rebuilt in unused clusters.

Exit codes, for the state after repair:
  0  nothing was found
  1  the check could not be carried out
  2  corruptions
  3  leaks, but no corruption
  63 images of this format cannot be checked";

const CORRUPTIONS: u8 = 2;
const LEAKS: u8 = 3;
const UNSUPPORTED: u8 = 63;

/// Arguments of `nbd-cli image check`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CheckArgs {
    /// The image: a file, or an export as an NBD URI, which is only read.
    pub path: OsString,

    /// Format of the image; detected unless given.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    /// Repair the findings. The image must not be in use.
    #[arg(short, long, value_enum, value_name = "WHAT")]
    pub repair: Option<RepairChoice>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    /// Check an image while another program writes to it. The findings need not be damage then.
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub locks: LockArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

/// The repairs to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepairChoice {
    /// Leaks only; nothing is written if anything else is wrong.
    Leaks,
    /// Leaks and corruptions.
    All,
}

/// The keys, and their absence at zero, are those of qemu-img.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct CheckOutcome {
    filename: String,
    format: &'static str,
    check_errors: u64,
    image_end_offset: u64,
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // The signature that serde calls.
fn is_zero(number: &u64) -> bool {
    *number == 0
}

pub(crate) fn run(args: &CheckArgs) -> Result<Outcome, CommandError> {
    let share = ShareArgs { force_share: args.force_share };
    let mut options = share.apply(args.locks.options()).policy(OpenPolicy::deny());
    options.format = args.format.map(Format::from);
    let repair = match args.repair {
        None => Repair::None,
        Some(RepairChoice::Leaks) => Repair::Leaks,
        Some(RepairChoice::All) => Repair::All,
    };
    let location = location::parse_alone(&args.path, &args.server)?;
    let report = match check(&location, &options, repair, &args.server.remotes())? {
        Ok(report) => report,
        Err(why) => {
            let _ = writeln!(std::io::stderr(), "nbd-cli: {why}");
            return Ok(Outcome::Status(UNSUPPORTED));
        }
    };
    unless_closed(print(args, &report))?;
    Ok(match (report.corruptions, report.leaks) {
        (0, 0) => Outcome::Success,
        (0, _) => Outcome::Status(LEAKS),
        _ => Outcome::Status(CORRUPTIONS),
    })
}

fn print(args: &CheckArgs, report: &CheckReport) -> Result<(), CommandError> {
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&json(args, report))?,
        ReportFormat::Text => text(report, &mut output)?,
    }
    output.finish()
}

/// The inner error means that such an image cannot be checked.
fn check(
    location: &ImageLocation,
    options: &OpenOptions,
    repair: Repair,
    remotes: &Remotes,
) -> Result<Result<CheckReport, Error>, CommandError> {
    let (location, options) = location.settled(options, remotes)?;
    let options = &options;
    let (checked, can_be_described) = match location {
        ImageLocation::Export { .. } if repair != Repair::None => {
            return Err(CommandError::new(format!(
                "cannot repair {location}: an export is only checked, because nothing keeps others \
                 from using it meanwhile; repair the image where its file is"
            )));
        }
        ImageLocation::Export { uri, files } => {
            let storage = Arc::new(connect_to(uri, *files, remotes)?);
            let checked = Image::check_storage(storage.clone(), options, Repair::None)
                .map_err(|error| error.with_path(uri.to_string()));
            (checked, Image::inspect_storage(storage, options).is_ok())
        }
        file => {
            let checked = Image::check_file(file.path(), options, repair);
            (checked, Image::inspect_file(file.path(), options).is_ok())
        }
    };
    match checked {
        Ok(report) => Ok(Ok(report)),
        // An image that cannot even be described has an unknown feature.
        Err(error)
            if error.kind() == ErrorKind::Unsupported
                && (error.found_format().is_some() || can_be_described) =>
        {
            Ok(Err(error))
        }
        Err(error) => Err(advise_sharing(explained(error))),
    }
}

fn json(args: &CheckArgs, report: &CheckReport) -> CheckOutcome {
    CheckOutcome {
        filename: path_in(&args.path).to_string_lossy().into_owned(),
        // No other format can be checked.
        format: Format::Qcow2.name(),
        check_errors: 0,
        image_end_offset: report.image_end_offset,
        total_clusters: report.total_clusters,
        allocated_clusters: report.allocated_clusters,
        compressed_clusters: report.compressed_clusters,
        fragmented_clusters: report.fragmented_clusters,
        corruptions: report.corruptions,
        leaks: report.leaks,
        corruptions_fixed: report.corruptions_repaired,
        leaks_fixed: report.leaks_repaired,
    }
}

fn text(report: &CheckReport, output: &mut Output) -> Result<(), CommandError> {
    for message in &report.messages {
        output.line(&printable(message))?;
    }
    let (leaks, corruptions) = (report.leaks_repaired, report.corruptions_repaired);
    if leaks + corruptions > 0 {
        output.line(&format!("repaired: {leaks} leaks, {corruptions} corruptions"))?;
    }
    match (report.leaks, report.corruptions) {
        (0, 0) => output.line("no errors were found")?,
        (leaks, corruptions) => {
            output.line(&format!("found: {leaks} leaks, {corruptions} corruptions"))?;
        }
    }
    let percent = |part: u64, whole: u64| match whole {
        0 => 0.0,
        _ => part as f64 * 100.0 / whole as f64,
    };
    let allocated = report.allocated_clusters;
    output.line(&format!(
        "{allocated} of {} clusters allocated ({:.2} %), {:.2} % fragmented, {:.2} % compressed",
        report.total_clusters,
        percent(allocated, report.total_clusters),
        percent(report.fragmented_clusters, allocated),
        percent(report.compressed_clusters, allocated),
    ))?;
    output.line(&format!("the image ends at offset {}", report.image_end_offset))
}
