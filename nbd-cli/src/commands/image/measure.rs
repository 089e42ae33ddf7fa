//! `nbd-cli image measure`.

use std::ffi::OsString;

use clap::Args;
use imgfmt::{BitmapState, CreateOptions, ExtentKind, Format, Image, L2Entries, Qcow2Version};
use serde::Serialize;

use super::create::Qcow2Args;
use super::open::OpenArgs;
use super::place::Place;
use super::walk::Extents;
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::ImageFormat;
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat};
use crate::size::{ByteSize, rounded};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image measure --output-format qcow2 disk.img
  nbd-cli image measure --output-format qcow2 --size 1T
  nbd-cli image measure --json --output-format raw disk.qcow2
  nbd-cli image measure --output-format qcow2 nbd://localhost/disk

Says how large the file of a new image would be, without compression: at first (\"required\"), and
when the guest has written everywhere (\"fully allocated\").";

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
    pub output_format: ImageFormat,

    /// Measure this internal snapshot, given by name or id, in place of the present state.
    #[arg(short = 'l', long, value_name = "NAME", conflicts_with = "size")]
    pub snapshot: Option<String>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub qcow2: Qcow2Args,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    #[command(flatten)]
    pub open: OpenArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

/// Sizes in bytes, with the keys of qemu-img.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    required: u64,
    fully_allocated: u64,
    /// What copies of the dirty bitmaps would take up in addition, where both images can have some.
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
}

pub(crate) fn run(args: &MeasureArgs) -> Result<Outcome, CommandError> {
    let mut create = CreateOptions::new(args.output_format.into(), 0);
    args.qcow2.apply(&mut create)?;
    let image = match &args.path {
        None => {
            args.server.check([])?;
            None
        }
        Some(path) => {
            let mut options = args.share.apply(args.open.options_with(&args.server));
            options.snapshot.clone_from(&args.snapshot);
            Some(
                Place::parse_one(path, &args.server, &args.open.trust)?
                    .open(&options, &args.server)
                    .map_err(advise_sharing)?,
            )
        }
    };
    let size = match (&image, args.size) {
        (Some(image), _) => image.size(),
        (None, size) => size.map_or(0, ByteSize::bytes),
    };
    let report = match create.format {
        Format::Qcow2 => {
            check_geometry(&create)?;
            let data = match &image {
                Some(image) => data_clusters(image, create.cluster_size)?,
                None => 0,
            };
            let report = qcow2(size, data, &create).ok_or_else(|| {
                CommandError::new(format!("a disk of {size} bytes is too large for qcow2"))
            })?;
            Report { bitmaps: bitmaps(image.as_ref(), &create)?, ..report }
        }
        _ => Report { required: size, fully_allocated: size, bitmaps: None },
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
            "--cluster-size {size} is not possible; choose a power of two from 512 to 2M"
        )));
    }
    if !bits.is_power_of_two() || bits > 64 {
        return Err(CommandError::new(format!(
            "--refcount-bits {bits} is not possible; choose a power of two from 1 to 64"
        )));
    }
    Ok(())
}

/// How many clusters of a copy would hold data.
fn data_clusters(image: &Image, cluster: u64) -> Result<u64, CommandError> {
    let mut extents = Extents::new(image);
    let (mut count, mut counted_to) = (0, 0);
    while let Some(extent) = extents.next()? {
        if extent.kind == ExtentKind::Data {
            let first = (extent.range.offset().bytes() / cluster).max(counted_to);
            let end = extent.range.end().bytes().div_ceil(cluster);
            count += end.saturating_sub(first);
            counted_to = counted_to.max(end);
        }
    }
    Ok(count)
}

/// What the image's dirty bitmaps would take up in a new image, all their clusters allocated; `None` if
/// one of the two cannot have any. Those that cannot be relied on are not copied.
fn bitmaps(image: Option<&Image>, create: &CreateOptions) -> Result<Option<u64>, CommandError> {
    let Some(image) = image else { return Ok(None) };
    let has_version_3 = |version| version == Qcow2Version::V3;
    let source = image.info()?.qcow2;
    if !has_version_3(create.version) || !source.is_some_and(|it| has_version_3(it.version)) {
        return Ok(None);
    }
    let cluster = create.cluster_size;
    let (mut total, mut directory) = (0_u64, 0_u64);
    for bitmap in image.bitmaps() {
        if matches!(bitmap.state, BitmapState::Consistent { .. }) {
            let bytes = image.size().div_ceil(bitmap.granularity).div_ceil(8);
            let clusters = bytes.div_ceil(cluster);
            // The bits, and the table that lists their clusters.
            total += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
            directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
        }
    }
    Ok(Some(total + directory.next_multiple_of(cluster)))
}

/// The sizes of a qcow2 file with room for all tables, `data` of whose clusters hold data.
fn qcow2(size: u64, data: u64, create: &CreateOptions) -> Option<Report> {
    let cluster = create.cluster_size;
    let entry = if create.l2_entries == L2Entries::Extended { 16 } else { 8 };
    let clusters = size.div_ceil(cluster);
    let l2_tables = clusters.div_ceil(cluster / entry);
    let l1 = l2_tables.div_ceil(cluster / 8);
    // The header is the one.
    let counted = clusters.checked_add(l2_tables + l1 + 1)?;
    let per_block = cluster * 8 / u64::from(create.refcount_bits);
    // The blocks count themselves and the table that lists them: repeat until nothing changes.
    let (mut blocks, mut table) = (0, 0);
    loop {
        let needed = (counted + blocks + table).div_ceil(per_block);
        let listed = needed.div_ceil(cluster / 8);
        if (needed, listed) == (blocks, table) {
            break;
        }
        (blocks, table) = (needed, listed);
    }
    let tables = (l2_tables + l1 + 1 + blocks + table).checked_mul(cluster)?;
    Some(Report {
        bitmaps: None,
        required: tables.checked_add(data.checked_mul(cluster)?)?,
        fully_allocated: tables.checked_add(clusters.checked_mul(cluster)?)?,
    })
}
