//! `nbd-cli image info`.

mod graph;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Args;
use imgfmt::{Backup, Encryption, ImageInfo, OpenOptions, Qcow2Info};
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::image_report::{
    DescribedImage, ForeignReport, FormatSpecific, FormatSpecificData, ImageReport,
    VmdkExtentReport, describe, describe_chain,
};
use nbd_jobs::size::{exact, rounded};

use super::open::{OpenArgs, TrustArgs};
use super::read::ReadArgs;
use super::snapshot;
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, printable};
use crate::terminal;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image info disk.qcow2
  nbd-cli image info --json disk.qcow2
  nbd-cli image info --backing-chain overlay.qcow2
  nbd-cli image info --graph overlay.qcow2
  nbd-cli image info nbd://localhost/disk

Only the file itself is read: the backing file and the data file that it names are not opened, unless
--backing-chain or --graph is given.";

/// Arguments of `nbd-cli image info`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct InfoArgs {
    /// The image: a file, or an export as an NBD URI.
    pub path: OsString,

    /// Describe the complete chain of backing files as well.
    #[arg(long)]
    pub backing_chain: bool,

    /// Draw the chain of backing files, with their data files, sizes, space and dates.
    #[arg(long, conflicts_with = "json")]
    pub graph: bool,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub read: ReadArgs,
}

pub(crate) fn run(args: &InfoArgs) -> Result<Outcome, CommandError> {
    let location = args.read.location(&args.path)?;
    let layers = layers(args, location).map_err(advise_sharing)?;
    if args.graph {
        return draw(&layers);
    }
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json if args.backing_chain => {
            output.json(&layers.iter().map(DescribedImage::report).collect::<Vec<_>>())?;
        }
        ReportFormat::Json => {
            for found in &layers {
                output.json(&found.report())?;
            }
        }
        ReportFormat::Text => {
            for (index, found) in layers.iter().enumerate() {
                if index > 0 {
                    output.line("")?;
                }
                text(found, &mut output)?;
            }
        }
    }
    output.finish()?;
    Ok(Outcome::Success)
}

/// Draws a chain, for `nbd-cli info`. An image may be in use: only its metadata is read.
pub(in crate::commands) fn draw_chain(
    image: &OsStr,
    trust_image: bool,
    server: &ServerArgs,
) -> Result<Outcome, CommandError> {
    let trust = TrustArgs { trust_image, ..TrustArgs::default() };
    let open = OpenArgs { trust, ..OpenArgs::default() };
    let share = ShareArgs { force_share: true };
    let read = ReadArgs { share, open, server: server.clone() };
    draw(&describe_chain(read.location(image)?, &read.options(), &read.remotes())?)
}

fn draw(layers: &[DescribedImage]) -> Result<Outcome, CommandError> {
    let nodes = (0..).zip(layers);
    let nodes = nodes.flat_map(|(index, it)| graph::nodes(&it.location, &it.info, index == 0));
    let nodes: Vec<_> = nodes.collect();
    let drawn = nbd_jobs::graph::graph(&nodes, terminal::columns(), terminal::character_set());
    let mut output = Output::new();
    drawn.iter().try_for_each(|line| output.line(line))?;
    output.finish()?;
    Ok(Outcome::Success)
}

/// Prints the properties of an image after it was created or changed.
pub(super) fn print_json(path: &Path, options: &OpenOptions) -> Result<(), CommandError> {
    let location = ImageLocation::File(path.to_owned());
    let image = describe(location, options, &ServerArgs::default().remotes())?;
    let mut output = Output::new();
    output.json(&image.report())?;
    output.finish()
}

/// Returns the image and, on request, everything below it.
fn layers(args: &InfoArgs, location: ImageLocation) -> Result<Vec<DescribedImage>, CommandError> {
    let options = args.read.options();
    let remotes = args.read.remotes();
    let mut layers = match args.backing_chain || args.graph {
        true => describe_chain(location, &options, &remotes)?,
        false => vec![describe(location, &options, &remotes)?],
    };
    if let Some(named) = layers.first_mut() {
        named.ask_server(&remotes)?;
    }
    Ok(layers)
}

fn text(found: &DescribedImage, output: &mut Output) -> Result<(), CommandError> {
    let info = &found.info;
    let mut line = |what: &str, value: &str| output.line(&format!("{what:<18} {value}"));
    line("image:", &printable(&found.location.name()))?;
    line("format:", info.format.name())?;
    line("virtual size:", &format!("{} ({} bytes)", rounded(info.size), info.size))?;
    if let Some(bytes) = found.actual_size {
        line("space taken:", &rounded(bytes))?;
    }
    if let Some(server) = &found.server {
        line("protocol:", &server.protocol())?;
        line("server offers:", &server.abilities().join(", "))?;
        for context in server.contexts() {
            line("context:", &printable(context))?;
        }
    }
    if let Some(encryption) = &info.encryption {
        line("encryption:", &printable(&encryption_text(encryption)))?;
    }
    if let Some(name) = &info.backing_name {
        line("backing file:", &printable(&name.to_string_lossy()))?;
        let format = info.backing_format.as_deref().unwrap_or("not said");
        line("backing format:", &printable(format))?;
    }
    match &info.qcow2 {
        Some(qcow2) => qcow2_text(qcow2, &found.report(), output),
        None => foreign_text(info, &found.report(), output),
    }
}

/// Information specific to other programs' formats.
fn foreign_text(
    info: &ImageInfo,
    report: &ImageReport,
    output: &mut Output,
) -> Result<(), CommandError> {
    let mut line = |what: &str, value: &str| output.line(&format!("{what:<18} {value}"));
    if let Some(size) = info.block_size {
        line("block size:", &exact(size))?;
    }
    let Some(FormatSpecific { data: FormatSpecificData::Foreign(specific), .. }) =
        &report.format_specific
    else {
        return Ok(());
    };
    match &**specific {
        ForeignReport::Vdi(vdi) => {
            line("subformat:", vdi.subformat)?;
            line("blocks in file:", &vdi.allocated_blocks.to_string())
        }
        ForeignReport::Vpc(vpc) => {
            line("subformat:", vpc.subformat)?;
            let (cylinders, heads, sectors) = (vpc.cylinders, vpc.heads, vpc.sectors);
            let geometry = format!("{cylinders} cylinders, {heads} heads, {sectors} sectors");
            line("geometry:", &geometry)?;
            if vpc.current_size != info.size {
                let size = format!("{} bytes in its footer", vpc.current_size);
                line("size:", &format!("by its geometry; {size}"))?;
            }
            line("made by:", &printable(&vpc.creator))?;
            vpc.uuid.iter().try_for_each(|uuid| line("uuid:", uuid))
        }
        ForeignReport::Vhdx(vhdx) => {
            line("subformat:", vhdx.subformat)?;
            line("sector size:", &exact(vhdx.logical_sector_size))?;
            let state = match vhdx.log_in_use {
                true => "not closed properly: replayed in memory at each open",
                false => "empty",
            };
            line("log:", &format!("{state} ({})", exact(vhdx.log_size)))
        }
        ForeignReport::Vmdk(vmdk) => {
            line("subformat:", &printable(&vmdk.create_type))?;
            line("content id:", &format!("{:08x}", vmdk.cid))?;
            if vmdk.parent_cid != u32::MAX {
                line("parent's id:", &format!("{:08x}", vmdk.parent_cid))?;
            }
            vmdk.extents.iter().try_for_each(|extent| line("extent:", &extent_text(extent)))
        }
        _ => Ok(()),
    }
}

/// A part of the disk of a VMDK in one line.
fn extent_text(extent: &VmdkExtentReport) -> String {
    let mut parts = vec![extent.format.to_owned(), rounded(extent.virtual_size)];
    if let Some(size) = extent.cluster_size {
        parts.push(format!("grains of {}", exact(size)));
    }
    if extent.compressed {
        parts.push("compressed".to_owned());
    }
    if extent.format != "ZERO" {
        parts.push(printable(&extent.filename));
    }
    parts.join(", ")
}

/// Information specific to qcow2.
fn qcow2_text(
    qcow2: &Qcow2Info,
    report: &ImageReport,
    output: &mut Output,
) -> Result<(), CommandError> {
    let Some(FormatSpecific { data: FormatSpecificData::Qcow2(specific), .. }) =
        &report.format_specific
    else {
        return Ok(());
    };
    let mut line = |what: &str, value: &str| output.line(&format!("{what:<18} {value}"));
    line("compat:", specific.compat)?;
    line("cluster size:", &exact(qcow2.cluster_size))?;
    line("refcount bits:", &specific.refcount_bits.to_string())?;
    line("compression:", specific.compression_type)?;
    let flags = [
        ("extended L2", specific.extended_l2),
        ("lazy refcounts", qcow2.lazy_refcounts),
        ("dirty bitmaps", qcow2.has_bitmaps),
        ("raw data file", qcow2.data_file_is_raw),
        ("not closed properly", qcow2.is_dirty),
        ("marked as damaged", qcow2.is_corrupt),
    ];
    let flags: Vec<_> = flags.iter().filter(|(_, is_set)| *is_set).map(|(name, _)| *name).collect();
    if !flags.is_empty() {
        line("flags:", &flags.join(", "))?;
    }
    if let Some(name) = &qcow2.data_file_name {
        line("data file:", &printable(&name.to_string_lossy()))?;
    }
    if let Some(found) = &qcow2.backup {
        line("backup:", &backup_text(found))?;
    }
    for bitmap in &specific.bitmaps {
        let flags = bitmap.flags.join(", ");
        let flags = if flags.is_empty() { flags } else { format!(" ({flags})") };
        let granularity = exact(bitmap.granularity);
        let incomplete = bitmap.frozen.as_ref().map_or_else(String::new, |frozen| {
            format!(", incomplete: '{}' contains its frozen bits", printable(frozen))
        });
        let name = printable(&bitmap.name);
        line("bitmap:", &format!("{name}, granularity {granularity}{flags}{incomplete}"))?;
    }
    if !qcow2.snapshots.is_empty() {
        line("snapshots:", "id, size of the disk, time, name")?;
        snapshot::text(&qcow2.snapshots, output)?;
    }
    Ok(())
}

/// The identity of a backup in one line.
fn backup_text(backup: &Backup) -> String {
    let identity = &backup.identity;
    let mut parts = vec![identity.id.to_string(), format!("of '{}'", printable(&identity.export))];
    if let Some(base) = identity.base.id() {
        parts.push(format!("upon {base}"));
    }
    if !backup.is_unchanged {
        parts.push("changed since".to_owned());
    }
    parts.join(", ")
}

/// The encryption in one line.
fn encryption_text(encryption: &Encryption) -> String {
    let Encryption::Luks(Some(luks)) = encryption else { return encryption.name().to_owned() };
    let details = luks.details.as_ref().map(|details| {
        let active = details.slots.iter().filter(|slot| slot.is_active).count();
        let (cipher, mode) = (&details.cipher, &details.cipher_mode);
        format!(", {cipher}-{mode}, {active} of {} key slots in use", details.slots.len())
    });
    let (name, details) = (encryption.name(), details.unwrap_or_default());
    format!("{name} version {}{details}, uuid {}", luks.version, luks.uuid)
}
