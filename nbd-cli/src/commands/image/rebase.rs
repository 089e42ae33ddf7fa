//! `nbd-cli image rebase`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use imgfmt::jobs::Clusters;
use imgfmt::{Format, Image};
use nbd_jobs::overlay::rebase_overlay;

use super::info::print_json;
use super::open::{OpenArgs, explained, pinned};
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::image_format::ImageFormat;
use crate::progress::ProgressArgs;
use crate::shown::Shown;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image rebase --backing new-base.qcow2 --backing-format qcow2 overlay.qcow2
  nbd-cli image rebase --backing nbd://localhost/base --backing-format raw overlay.qcow2
  nbd-cli image rebase --no-backing overlay.qcow2
  nbd-cli image rebase --unsafe --backing moved/base.img --backing-format raw overlay.qcow2

The disk stays the same: the differences between the old and the new backing file are copied into
the overlay first. With --unsafe only the name is changed, for a backing file that was moved or
renamed: no content is compared, and the file may be missing. A backing file whose chain leads back
to the overlay is refused. A relative name starts at the directory of the overlay. An overlay whose
backing file is on a server can be opened only with --trust-image.";

/// Arguments of `nbd-cli image rebase`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(group(ArgGroup::new("new").required(true).args(["backing", "no_backing"])))]
pub struct RebaseArgs {
    /// The overlay.
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// The new backing file, or an export of a server as an NBD URI.
    #[arg(short, long, value_name = "FILE", requires = "backing_format")]
    pub backing: Option<OsString>,

    /// Format of the new backing file.
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<ImageFormat>,

    /// Make the image independent of any backing file.
    #[arg(long)]
    pub no_backing: bool,

    /// Change the name only. The disk is corrupted if the new file has other contents.
    #[arg(short = 'u', long = "unsafe")]
    pub is_unsafe: bool,

    #[command(flatten)]
    pub progress: ProgressArgs,

    /// Print the changed image, like `nbd-cli image info --json`.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub open: OpenArgs,
}

pub(crate) fn run(args: &RebaseArgs) -> Result<Outcome, CommandError> {
    let format = args.backing_format.map(Format::from);
    let backing = args.backing.as_deref().map(pinned);
    let backing = backing.transpose()?;
    let new = backing.as_deref().zip(format);
    if let Some(new) = new {
        // Before anything is copied.
        Image::check_new_backing(&args.path, &args.open.options(), new)?;
    }
    if args.is_unsafe {
        Image::change_backing_file(&args.path, &args.open.options(), new).map_err(explained)?;
    } else {
        keep_content(args, new)?;
    }
    if args.json {
        print_json(&args.path, &args.open.options().format(Format::Qcow2))?;
    }
    Ok(Outcome::Success)
}

/// Copies into the overlay the clusters in which the old and the new backing file differ, and sets
/// the new one.
fn keep_content(args: &RebaseArgs, new: Option<(&OsStr, Format)>) -> Result<(), CommandError> {
    let shown = Shown::new(args.progress.visibility());
    let (overlay, backing) = (args.open.options(), args.open.trust.options());
    let remotes = ServerArgs::default().remotes();
    let context = shown.context();
    let plain = Clusters::Plain;
    let copied = rebase_overlay(&args.path, &overlay, new, &backing, plain, &remotes, &context);
    shown.clear();
    Ok(copied?)
}
