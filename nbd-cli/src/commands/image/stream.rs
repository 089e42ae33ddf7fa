//! `nbd-cli image stream`.

use std::path::PathBuf;

use clap::Args;
use nbd_jobs::JobContext;
use nbd_jobs::overlay::{StreamBase, measure_stream, stream_overlay};
use nbd_jobs::size::rounded;

use super::info::print_json;
use super::open::OpenArgs;
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::output::Output;
use crate::progress::{ProgressArgs, RateArgs};
use crate::shown::Shown;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image stream overlay.qcow2
  nbd-cli image stream --dry-run overlay.qcow2
  nbd-cli image stream --rate 50M --trust-image overlay.qcow2
  nbd-cli image stream --base golden.qcow2 overlay.qcow2

What the layers below the overlay provide is copied into it, and then the overlay stands alone; with
--base only the layers above that file are copied, and it becomes the backing file. The disk stays
the same, and its bitmaps stay valid. If the command fails or is interrupted, the overlay shows the
same disk; stream it again to go on. An overlay whose backing file is on a server or in a repository
can be opened only with --trust-image.";

/// Arguments of `nbd-cli image stream`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct StreamArgs {
    /// The overlay.
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// The layer that becomes the backing file; a relative name starts at the directory of the
    /// overlay.
    #[arg(short, long, value_name = "FILE", value_parser = FilePathParser)]
    pub base: Option<PathBuf>,

    /// Print how much would be copied, and change nothing.
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub rate: RateArgs,

    #[command(flatten)]
    pub progress: ProgressArgs,

    /// Print the overlay afterwards, like `nbd-cli image info --json`.
    #[arg(long, conflicts_with = "dry_run")]
    pub json: bool,

    #[command(flatten)]
    pub open: OpenArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

pub(crate) fn run(args: &StreamArgs) -> Result<Outcome, CommandError> {
    let shown = Shown::new(args.progress.visibility());
    let context = JobContext { rate_limit: args.rate.limit(), ..shown.context() };
    let options = args.open.options_with(&args.server);
    let base = args.base.as_deref().map_or(StreamBase::Nothing, StreamBase::File);
    if args.dry_run {
        let found = measure_stream(&args.path, &options, base, &context)?;
        shown.clear();
        let mut output = Output::new();
        let (data, zeroes) = (rounded(found.data), rounded(found.zeroes));
        output.line(&format!("{data} of data would be copied, {zeroes} recorded as zero"))?;
        output.finish()?;
        return Ok(Outcome::Success);
    }
    let done = stream_overlay(&args.path, &options, base, &context);
    shown.clear();
    done?;
    if args.json {
        print_json(&args.path, &args.open.options_with(&args.server))?;
    }
    Ok(Outcome::Success)
}
