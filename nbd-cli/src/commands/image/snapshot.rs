//! `nbd-cli image snapshot`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use imgfmt::{Image, OpenOptions, Snapshot};
use nbd_jobs::date::date_and_time;
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::image_report::SnapshotReport;
use nbd_jobs::remote::Remotes;
use nbd_jobs::size::rounded;

use super::open::OpenArgs;
use super::read::ReadArgs;
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::locking::advise_sharing;
use crate::output::{Output, ReportFormat, printable};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image snapshot create disk.qcow2 before-upgrade
  nbd-cli image snapshot list disk.qcow2
  nbd-cli image snapshot apply disk.qcow2 before-upgrade
  nbd-cli image snapshot delete disk.qcow2 before-upgrade

Snapshots are stored in the qcow2 image. A snapshot is selected by its name or its id. Applying one
restores the size of the disk as well.";

/// Arguments of `nbd-cli image snapshot`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct SnapshotArgs {
    /// The subcommand.
    #[command(subcommand)]
    pub command: SnapshotCommand,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// List the snapshots
    List(ListArgs),
    /// Create a snapshot of the current state
    Create(ChangeArgs),
    /// Return to a snapshot; later writes are lost
    Apply(ChangeArgs),
    /// Delete a snapshot
    Delete(ChangeArgs),
}

impl SnapshotCommand {
    /// Returns whether the command changes the image.
    pub(super) fn writes(&self) -> bool {
        !matches!(self, Self::List(_))
    }
}

/// Arguments of `nbd-cli image snapshot list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The image: a file, or an export as an NBD URI (with --format qcow2 for an image in it).
    pub path: OsString,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub read: ReadArgs,
}

/// Arguments of the commands that change snapshots.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    /// The image.
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// The snapshot.
    pub name: String,

    /// Print the resulting snapshots, like `list --json`.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub open: OpenArgs,
}

pub(crate) fn run(args: &SnapshotArgs) -> Result<Outcome, CommandError> {
    match &args.command {
        SnapshotCommand::List(args) => list(args),
        SnapshotCommand::Create(args) => change(args, Image::create_snapshot),
        SnapshotCommand::Apply(args) => change(args, Image::apply_snapshot),
        SnapshotCommand::Delete(args) => change(args, Image::delete_snapshot),
    }
}

fn change(
    args: &ChangeArgs,
    action: impl FnOnce(&mut Image, &str) -> imgfmt::Result<()>,
) -> Result<Outcome, CommandError> {
    let mut image = args.open.change(&args.path)?;
    action(&mut image, &args.name)?;
    image.close()?;
    match args.json {
        true => {
            let location = ImageLocation::File(args.path.clone());
            print(
                &location,
                &args.open.options(),
                &ServerArgs::default().remotes(),
                ReportFormat::Json,
            )
        }
        false => Ok(Outcome::Success),
    }
}

fn list(args: &ListArgs) -> Result<Outcome, CommandError> {
    let location = args.read.location(&args.path)?;
    let options = args.read.options();
    let format = ReportFormat::from_json_flag(args.json);
    print(&location, &options, &args.read.remotes(), format).map_err(advise_sharing)
}

fn print(
    location: &ImageLocation,
    options: &OpenOptions,
    remotes: &Remotes,
    format: ReportFormat,
) -> Result<Outcome, CommandError> {
    let info = location.inspect(options, remotes)?;
    if !info.format.is_supported() {
        return Err(CommandError::new(format!(
            "cannot list the snapshots of {location}: it is a {} image, which cannot be read; give the \
             format 'raw' to use its bytes as they are (--format raw)",
            info.format.description()
        )));
    }
    let snapshots = info.qcow2.map(|qcow2| qcow2.snapshots).unwrap_or_default();
    let mut output = Output::new();
    match format {
        ReportFormat::Json => {
            output.json(&snapshots.iter().map(SnapshotReport::from).collect::<Vec<_>>())?;
        }
        ReportFormat::Text => text(&snapshots, &mut output)?,
    }
    output.finish()?;
    Ok(Outcome::Success)
}

/// One line per snapshot: id, disk size, time, name.
pub(super) fn text(snapshots: &[Snapshot], output: &mut Output) -> Result<(), CommandError> {
    for snapshot in snapshots {
        output.line(&format!(
            "{:>4}  {:>10}  {}  {}",
            printable(&snapshot.id),
            rounded(snapshot.disk_size),
            date_and_time(snapshot.date_s.into()),
            printable(&snapshot.name),
        ))?;
    }
    Ok(())
}
