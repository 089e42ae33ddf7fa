//! `nbd-cli bitmap`: the dirty bitmaps of a qcow2 image, without a server.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use imgfmt::{BackingFile, BitmapChange, BitmapState, Image, Recording};
use nbd_jobs::bitmaps::{
    BitmapList, change_bitmaps, check_all_complete, granularity_default, merges_from,
};
use nbd_jobs::size::{ByteSize, rounded};

use super::image::open::OpenArgs;
use super::image::read::ReadArgs;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, printable};
use crate::shown::warnings;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli bitmap add disk.qcow2 monday
  nbd-cli bitmap list disk.qcow2
  nbd-cli bitmap merge disk.qcow2 week monday tuesday
  nbd-cli bitmap merge overlay.qcow2 week week --from base.qcow2
  nbd-cli bitmap repair disk.qcow2 monday

A dirty bitmap is stored in a qcow2 image and records which parts of the disk change. Each command
takes effect completely or not at all, even if it is interrupted.

During a checkpoint the earlier bits of NAME are in NAME.checkpoint. If the server is killed then,
the next command that changes the image, or the next writable 'serve', first merges them back into
NAME. Any disabled bitmap NAME.checkpoint with the granularity of NAME is treated this way.

These commands are refused while the image is being served.";

/// Arguments of `nbd-cli bitmap`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct BitmapArgs {
    /// The subcommand.
    #[command(subcommand)]
    pub command: BitmapCommand,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum BitmapCommand {
    /// List the bitmaps of an image
    List(ListArgs),
    /// Add an empty bitmap
    Add(AddArgs),
    /// Remove a bitmap in any state
    Remove(ChangeArgs),
    /// Clear a bitmap
    Clear(ChangeArgs),
    /// Start recording changes
    Enable(ChangeArgs),
    /// Stop recording changes
    Disable(ChangeArgs),
    /// Add the dirty ranges of other bitmaps
    Merge(MergeArgs),
    /// Make an unreliable bitmap usable again by marking everything as dirty
    Repair(ChangeArgs),
    /// Restore the bits of checkpoints that the end of a server interrupted
    Recover(ImageArgs),
}

impl BitmapCommand {
    /// Returns whether the command changes the image.
    pub(crate) fn writes(&self) -> bool {
        !matches!(self, Self::List(_))
    }
}

/// Arguments of `nbd-cli bitmap list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The image: a file, or an export as an NBD URI (with --format qcow2 for an image in it).
    #[arg(value_name = "IMAGE")]
    pub path: OsString,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub read: ReadArgs,
}

/// The image and the form of the report.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// The image.
    #[arg(value_name = "IMAGE")]
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// Print the resulting bitmaps of the image as JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub open: OpenArgs,
}

/// Arguments of the commands that change one bitmap.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub image: ImageArgs,

    /// The bitmap.
    pub name: String,
}

/// Arguments of `nbd-cli bitmap add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub image: ImageArgs,

    /// The name of the new bitmap: 1 to 1023 bytes.
    pub name: String,

    /// Bytes of the disk per bit: a power of two from 512 to 2G. By default the size of a cluster,
    /// but at least 4K and at most 64K.
    #[arg(short, long, value_name = "SIZE")]
    pub granularity: Option<ByteSize>,

    /// Do not record changes until it is enabled.
    #[arg(long)]
    pub disabled: bool,
}

/// Arguments of `nbd-cli bitmap merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub image: ImageArgs,

    /// The bitmap that is changed.
    pub into: String,

    /// The bitmaps that are added to it.
    #[arg(required = true)]
    pub sources: Vec<String>,

    /// The image that has the bitmaps to be added, if it differs.
    #[arg(long, value_name = "IMAGE", value_parser = FilePathParser)]
    pub from: Option<PathBuf>,
}

pub(crate) fn run(args: &BitmapArgs) -> Result<Outcome, CommandError> {
    let named = |change: fn(String) -> BitmapChange, args: &ChangeArgs| {
        carry_out(&args.image, |_| Ok(vec![change(args.name.clone())]))
    };
    match &args.command {
        BitmapCommand::List(args) => list(args),
        BitmapCommand::Add(args) => add(args),
        BitmapCommand::Remove(args) => named(|name| BitmapChange::Remove { name }, args),
        BitmapCommand::Clear(args) => named(|name| BitmapChange::Clear { name }, args),
        BitmapCommand::Enable(args) => named(|name| BitmapChange::Enable { name }, args),
        BitmapCommand::Disable(args) => named(|name| BitmapChange::Disable { name }, args),
        BitmapCommand::Merge(args) => merge(args),
        BitmapCommand::Repair(args) => named(|name| BitmapChange::Repair { name }, args),
        BitmapCommand::Recover(args) => carry_out(args, |image| {
            // They were restored if that was possible.
            check_all_complete(image)?;
            Ok(Vec::new())
        }),
    }
}

fn list(args: &ListArgs) -> Result<Outcome, CommandError> {
    let location = args.read.location(&args.path)?;
    let options = args.read.options();
    // Bitmaps are those of one layer: what lies below need not be readable.
    let options = options.backing(BackingFile::Ignored);
    let image = location.open(&options, &args.read.remotes()).map_err(advise_sharing)?;
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&BitmapList::of(&image))?,
        ReportFormat::Text => text(&image, &mut output)?,
    }
    output.finish()?;
    Ok(Outcome::Success)
}

fn add(args: &AddArgs) -> Result<Outcome, CommandError> {
    carry_out(&args.image, |image| {
        let recording = if args.disabled { Recording::Disabled } else { Recording::Enabled };
        let granularity = match args.granularity {
            Some(size) => size.bytes(),
            None => granularity_default(image)?,
        };
        Ok(vec![BitmapChange::Add { name: args.name.clone(), granularity, recording }])
    })
}

fn merge(args: &MergeArgs) -> Result<Outcome, CommandError> {
    let changes = match &args.from {
        None => {
            let merge =
                |from: &String| BitmapChange::Merge { into: args.into.clone(), from: from.clone() };
            args.sources.iter().map(merge).collect::<Vec<_>>()
        }
        Some(path) => {
            // Closed again before the other one is opened: one may be the other's backing file.
            let other = args.image.open.read(path, ShareArgs::default())?;
            merges_from::<CommandError>(&other, &args.sources, &args.into)?
        }
    };
    carry_out(&args.image, |_| Ok(changes))
}

/// Opens the image and makes all changes at once.
fn carry_out(
    args: &ImageArgs,
    changes: impl FnOnce(&Image) -> Result<Vec<BitmapChange>, CommandError>,
) -> Result<Outcome, CommandError> {
    let image = args.open.change(&args.path)?;
    change_bitmaps(&image, &*warnings(), changes)?;
    let mut output = Output::new();
    if args.json {
        output.json(&BitmapList::of(&image))?;
    }
    image.close()?;
    output.finish()?;
    Ok(Outcome::Success)
}

/// Prints one line per bitmap: granularity, recording state, dirty bytes, name.
fn text(image: &Image, output: &mut Output) -> Result<(), CommandError> {
    if let Some(damage) = image.bitmap_damage() {
        output.line(&format!("the bitmaps cannot be found: {}", printable(&damage)))?;
    }
    for bitmap in image.bitmaps() {
        let recording = match bitmap.recording {
            Recording::Enabled => "enabled",
            Recording::Disabled => "disabled",
        };
        let state = match &bitmap.state {
            BitmapState::Consistent { dirty_bytes } => format!("{} dirty", rounded(*dirty_bytes)),
            BitmapState::Inconsistent { reason } => format!("inconsistent: {}", printable(reason)),
            BitmapState::Damaged { reason } => format!("damaged: {}", printable(reason)),
            BitmapState::Incomplete { .. } => match bitmap.state.problem() {
                Some(problem) => format!("incomplete: {}", printable(&problem)),
                None => "incomplete".into(),
            },
            _ => "unknown".into(),
        };
        output.line(&format!(
            "{:>8}  {recording:<8}  {}  {state}",
            rounded(bitmap.granularity),
            printable(&bitmap.name),
        ))?;
    }
    Ok(())
}
