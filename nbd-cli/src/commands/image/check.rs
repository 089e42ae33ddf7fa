//! `nbd-cli image check`.

use std::ffi::OsString;
use std::io::Write as _;

use clap::{Args, ValueEnum};
use imgfmt::{CheckReport, Format, OpenPolicy, Repair};
use nbd_jobs::image_check::{CheckSummary, Checked, EXIT_CODE_UNSUPPORTED, Verdict, check};
use nbd_jobs::qemu_name::path_in;

use super::location;
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

    /// Check an image while another program writes to it. Findings are then not necessarily damage.
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
    let checked = check(&location, &options, repair, &args.server.remotes());
    match checked.map_err(advise_sharing)? {
        Checked::Examined(report) => {
            unless_closed(print(args, &report))?;
            Ok(Outcome::Status(Verdict::of(&report).exit_code()))
        }
        Checked::Unsupported(why) => {
            let _ = writeln!(std::io::stderr(), "nbd-cli: {why}");
            Ok(Outcome::Status(EXIT_CODE_UNSUPPORTED))
        }
    }
}

fn print(args: &CheckArgs, report: &CheckReport) -> Result<(), CommandError> {
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => {
            let name = path_in(&args.path).to_string_lossy().into_owned();
            output.json(&CheckSummary::new(name, report))?;
        }
        ReportFormat::Text => text(report, &mut output)?,
    }
    output.finish()
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
