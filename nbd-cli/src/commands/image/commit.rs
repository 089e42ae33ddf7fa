//! `nbd-cli image commit`.

use std::path::{Path, PathBuf};

use clap::Args;
use imgfmt::jobs::{JobErrorKind, commit};
use imgfmt::{Access, Format, Image, Locking, OpenOptions};
use nbd_jobs::JobContext;
use nbd_jobs::image_location::ImageLocation;

use super::info::print_json;
use super::open::{TrustArgs, explained, options};
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::image_format::ImageFormat;
use crate::progress::{ProgressArgs, RateArgs};
use crate::shown::Shown;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image commit overlay.qcow2
  nbd-cli image commit --keep overlay.qcow2

The contents of the overlay are written into its backing file, which then has the same contents as the
disk, and the overlay is emptied. Other overlays of the same backing file are corrupted by the change:
commit only into a file on which no other image depends.

If a commit fails or is interrupted, the overlay still shows the whole disk; commit it again.";

/// Arguments of `nbd-cli image commit`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CommitArgs {
    /// The overlay.
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// Format of the overlay; detected unless given.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    /// Do not empty the overlay: use this if it will be deleted.
    #[arg(long)]
    pub keep: bool,

    #[command(flatten)]
    pub rate: RateArgs,

    #[command(flatten)]
    pub progress: ProgressArgs,

    /// Print the overlay afterwards, like `nbd-cli image info --json`.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub trust: TrustArgs,
}

pub(crate) fn run(args: &CommitArgs) -> Result<Outcome, CommandError> {
    let shared = options(args.format, &args.trust);
    // Held until the end. The chain is opened without locks, because a read lock on the backing
    // file would prevent writing to it.
    let overlay_lock = args.trust.locks.open_file(&args.path, Access::ReadWrite)?;
    let unlocked = shared.clone().locking(Locking::Off);
    let overlay = Image::open(&args.path, &unlocked);
    let overlay = overlay.map_err(explained)?;
    let (location, format) = backing_of(args, &overlay)?;
    let mut backing_options: OpenOptions = shared.access(Access::ReadWrite);
    backing_options.format = format;
    let mut backing = location.open(&backing_options, &ServerArgs::default().remotes())?;
    let shown = Shown::new(args.progress.visibility());
    let context = JobContext { rate_limit: args.rate.limit(), ..shown.context() };
    let committed = commit(&overlay, &mut backing, &context.for_images());
    shown.clear();
    committed.map_err(|error| match error.kind() {
        JobErrorKind::DoesNotFit => error.into(),
        _ => CommandError::new(format!(
            "{error}; the overlay still shows the complete disk: commit it again"
        )),
    })?;
    backing.close()?;
    drop(overlay);
    if !args.keep {
        empty(&args.path, &unlocked.access(Access::ReadWrite)).map_err(|error| {
            let name = args.path.display();
            CommandError::new(format!("'{name}' is committed, but cannot be emptied: {error}"))
        })?;
    }
    drop(overlay_lock);
    if args.json {
        print_json(&args.path, &options(Some(ImageFormat::QCOW2), &args.trust))?;
    }
    Ok(Outcome::Success)
}

fn empty(path: &Path, options: &OpenOptions) -> imgfmt::Result<()> {
    let mut overlay = Image::open(path, options)?;
    overlay.clear_committed()?;
    overlay.close()
}

/// Returns the file or export to write into. The overlay could be opened, so the policy allows it.
fn backing_of(
    args: &CommitArgs,
    overlay: &Image,
) -> Result<(ImageLocation, Option<Format>), CommandError> {
    let qcow2 = overlay.info()?.qcow2;
    let Some((name, format)) =
        qcow2.and_then(|info| info.backing_name.zip(Some(info.backing_format)))
    else {
        return Err(CommandError::new(format!(
            "cannot commit '{}': it has no backing file",
            args.path.display()
        )));
    };
    // The chain could be opened, so any other name is one of a raw image.
    let format = format.map(|name| Format::from_name(&name).unwrap_or(Format::Raw));
    Ok((ImageLocation::File(args.path.clone()).beside(&name)?, format))
}
