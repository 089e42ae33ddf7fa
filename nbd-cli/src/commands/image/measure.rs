//! `nbd-cli image measure`.

use std::ffi::OsString;

use clap::Args;
use imgfmt::jobs::{JobContext, MeasuredDisk, measure};
use imgfmt::{CreateOptions, Format};
use nbd_jobs::size::{ByteSize, rounded};
use serde::Serialize;

use super::create::Qcow2Args;
use super::format_options::FormatOptions;
use super::read::ReadArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::NewImageFormat;
use crate::locking::advise_sharing;
use crate::output::{Output, ReportFormat};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image measure --output-format qcow2 disk.img
  nbd-cli image measure --output-format qcow2 --size 1T
  nbd-cli image measure --json --output-format raw disk.qcow2
  nbd-cli image measure --output-format qcow2 nbd://localhost/disk

Reports the size of the file of a new image, without compression: initially (\"required\"), and after
the guest has written everywhere (\"fully allocated\").";

/// Arguments of `nbd-cli image measure`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct MeasureArgs {
    /// The image that would be converted: a file, or an export as an NBD URI.
    #[arg(required_unless_present = "size")]
    pub path: Option<OsString>,

    /// Size of an empty disk, in place of an image.
    #[arg(short, long, conflicts_with = "path")]
    pub size: Option<ByteSize>,

    /// Format of the new image.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    pub output_format: NewImageFormat,

    /// Measure this internal snapshot, given by name or id, instead of the active state.
    #[arg(short = 'l', long, value_name = "NAME", conflicts_with = "size")]
    pub snapshot: Option<String>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub format_options: FormatOptions,

    #[command(flatten)]
    pub qcow2: Qcow2Args,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub read: ReadArgs,
}

/// Sizes in bytes, with the keys of qemu-img.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct MeasureReport {
    required: u64,
    fully_allocated: u64,
    /// Additional size of copies of the dirty bitmaps, if both images can have bitmaps.
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
}

pub(crate) fn run(args: &MeasureArgs) -> Result<Outcome, CommandError> {
    let mut create = CreateOptions::new(args.output_format.into(), 0);
    if args.format_options.help(&create)? {
        return Ok(Outcome::Success);
    }
    args.qcow2.apply(&mut create)?;
    args.format_options.apply(&mut create, &args.qcow2.given())?;
    let image = match &args.path {
        None => {
            args.read.server.check([])?;
            None
        }
        Some(path) => {
            let mut options = args.read.options();
            options.snapshot.clone_from(&args.snapshot);
            Some(
                args.read
                    .location(path)?
                    .open(&options, &args.read.remotes())
                    .map_err(advise_sharing)?,
            )
        }
    };
    if create.format == Format::Qcow2 {
        check_geometry(&create)?;
    }
    let disk = match &image {
        Some(image) => MeasuredDisk::Image(image),
        None => MeasuredDisk::Empty(args.size.map_or(0, ByteSize::bytes)),
    };
    let measured = measure(disk, &create, &JobContext::default())?;
    let report = MeasureReport {
        required: measured.required,
        fully_allocated: measured.fully_allocated,
        bitmaps: measured.bitmaps,
    };
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&report)?,
        ReportFormat::Text => {
            let line = |bytes| format!("{bytes} bytes ({})", rounded(bytes));
            output.line(&format!("required:        {}", line(report.required)))?;
            output.line(&format!("fully allocated: {}", line(report.fully_allocated)))?;
            if let Some(bytes) = report.bitmaps {
                output.line(&format!("bitmaps:         {}", line(bytes)))?;
            }
        }
    }
    output.finish()?;
    Ok(Outcome::Success)
}

fn check_geometry(create: &CreateOptions) -> Result<(), CommandError> {
    let (size, bits) = (create.cluster_size, create.refcount_bits);
    if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
        return Err(CommandError::new(format!(
            "--cluster-size {size} is invalid; choose a power of two from 512 to 2M"
        )));
    }
    if !bits.is_power_of_two() || bits > 64 {
        return Err(CommandError::new(format!(
            "--refcount-bits {bits} is invalid; choose a power of two from 1 to 64"
        )));
    }
    Ok(())
}
