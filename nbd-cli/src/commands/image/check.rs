//! `nbd-cli image check`.

use std::ffi::OsString;
use std::io::Write as _;

use clap::{Args, ValueEnum};
use imgfmt::{CheckReport, Format, OpenPolicy, Repair};
use nbd_jobs::archive_check::{ManifestReport, check_manifest};
use nbd_jobs::image_check::{CheckSummary, Checked, EXIT_CODE_UNSUPPORTED, Verdict, check};
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::qemu_name::path_in;
use serde::Serialize;

use super::location;
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::ImageFormat;
use crate::locking::{LockArgs, ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, printable, unless_closed};
use crate::progress::Visibility;
use crate::shown::Shown;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image check disk.qcow2
  nbd-cli image check --repair leaks disk.qcow2
  nbd-cli image check --json disk.qcow2
  nbd-cli image check machine.ova              the manifest of an archive, and its first disk
  nbd-cli image check nbd://localhost/disk     an image in an export, as bytes

Only the image itself is checked, not its backing file, and not the guest's data in it. A leak is lost
space; a corruption endangers data: copy the image before you repair it. A repair does not change
readable data. Unreliable refcounts are rebuilt in unused clusters.

Of VHDX, VMDK and VDI images, the tables are checked: whether every block can lie where they say.
'--repair all' makes the changes that the log of a VHDX holds; the others are not repaired.

Of an OVA archive that has a manifest (.mf), all files are compared with the digests in it; what was
changed, is missing or is not listed counts as a corruption. The manifest's signature (.cert) is not
verified.

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
    if let (ImageLocation::File(path), Repair::None) = (&location, repair) {
        let context = Shown::new(Visibility::Never).context();
        if let Some(manifest) = check_manifest(path, &options, &context)? {
            let disk = check(&location, &options, repair, &args.server.remotes());
            return archive(args, &manifest, disk.map_err(CommandError::from));
        }
    }
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

/// The report about an archive. Its disk is checked if its format allows that.
#[derive(Serialize)]
struct ArchiveReport<'r> {
    filename: String,
    #[serde(flatten)]
    manifest: &'r ManifestReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk: Option<CheckSummary>,
}

fn archive(
    args: &CheckArgs,
    manifest: &ManifestReport,
    disk: Result<Checked, CommandError>,
) -> Result<Outcome, CommandError> {
    let disk = match &disk {
        Ok(Checked::Examined(report)) => Some(report),
        Ok(Checked::Unsupported(_)) => None,
        // A file that was changed explains it.
        Err(_) if manifest.wrong().next().is_some() => None,
        Err(_) => return disk.map(|_| Outcome::Success),
    };
    let verdict = match (manifest.wrong().next(), disk) {
        (Some(_), _) => Verdict::Corruptions,
        (None, Some(report)) => Verdict::of(report),
        (None, None) => Verdict::Sound,
    };
    let mut output = Output::new();
    let printed = match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => {
            let filename = path_in(&args.path).to_string_lossy().into_owned();
            let disk = disk.map(|report| CheckSummary::new(filename.clone(), report));
            output.json(&ArchiveReport { filename, manifest, disk })
        }
        ReportFormat::Text => manifest_text(manifest, &mut output)
            .and_then(|()| disk.map_or(Ok(()), |report| text(report, &mut output))),
    };
    unless_closed(printed.and_then(|()| output.finish()))?;
    Ok(Outcome::Status(verdict.exit_code()))
}

fn manifest_text(manifest: &ManifestReport, output: &mut Output) -> Result<(), CommandError> {
    let (wrong, all) = (manifest.wrong().count(), manifest.files.len());
    for file in manifest.wrong() {
        output.line(&format!("'{}' {}", file.filename, file.state.words()))?;
    }
    let name = &manifest.manifest;
    match wrong {
        0 => output.line(&format!("all {all} files are as the manifest '{name}' says")),
        _ => output.line(&format!("{wrong} of {all} files are not as the manifest '{name}' says")),
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
    if report.total_clusters == 0 {
        return Ok(());
    }
    let allocated = report.allocated_clusters;
    output.line(&format!(
        "{allocated} of {} clusters allocated ({:.2} %), {:.2} % fragmented, {:.2} % compressed",
        report.total_clusters,
        percent(allocated, report.total_clusters),
        percent(report.fragmented_clusters, allocated),
        percent(report.compressed_clusters, allocated),
    ))?;
    match report.image_end_offset {
        0 => Ok(()),
        end => output.line(&format!("the image ends at offset {end}")),
    }
}
