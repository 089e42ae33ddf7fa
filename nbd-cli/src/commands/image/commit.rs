//! `nbd-cli image commit`.

use std::path::PathBuf;

use clap::Args;
use nbd_jobs::JobContext;
use nbd_jobs::overlay::{CommitBase, Committed, commit_overlay};

use super::info::print_json;
use super::open::{TrustArgs, options};
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
    let shown = Shown::new(args.progress.visibility());
    let context = JobContext { rate_limit: args.rate.limit(), ..shown.context() };
    let committed = if args.keep { Committed::Kept } else { Committed::Emptied };
    let remotes = ServerArgs::default().remotes();
    let overlay = options(args.format, &args.trust);
    let base = CommitBase::Backing;
    let done = commit_overlay(&args.path, base, &overlay, committed, &remotes, &context);
    shown.clear();
    done?;
    if args.json {
        print_json(&args.path, &options(Some(ImageFormat::QCOW2), &args.trust))?;
    }
    Ok(Outcome::Success)
}
