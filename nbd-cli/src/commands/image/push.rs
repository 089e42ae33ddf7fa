//! `nbd-cli image push`: puts an image on an object store.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use nbd_jobs::serving::ServeOptions;
use nbd_objects::{PushOptions, PushSource, StoreUrl, push};

use crate::error::{CommandError, Outcome};
use crate::objects::ObjectArgs;
use crate::output::{Output, warn};
use crate::progress::{Progress, ProgressArgs};
use crate::signals;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image push disk.qcow2 s3://bucket/images/disk.qcow2
  nbd-cli image push --endpoint http://localhost:8333 --verify disk.qcow2 s3://bucket/disk.qcow2

The file is put there byte for byte, in parts of 16M (larger ones from 156G on). The object appears
when it is complete. After an interruption the same command sends only what is missing; the parts
that have arrived are recorded in the cache directory.";

/// Arguments of `nbd-cli image push`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct PushArgs {
    /// The image file or block device.
    pub path: PathBuf,

    /// The object: s3://bucket/key.
    pub url: String,

    /// Replace an object of this name.
    #[arg(long)]
    pub replace: bool,

    /// Read the object afterwards, and compare it.
    #[arg(long)]
    pub verify: bool,

    #[command(flatten)]
    pub progress: ProgressArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub objects: Box<ObjectArgs>,
}

pub(crate) fn run(args: &PushArgs) -> Result<Outcome, CommandError> {
    let url: StoreUrl = args.url.parse().map_err(CommandError::new)?;
    let storage = ServeOptions::default().open_file(&args.path);
    let storage = storage.map_err(|error| CommandError::new(error.to_string()))?;
    let path = std::path::absolute(&args.path).map_err(|error| {
        CommandError::new(format!("cannot find '{}': {error}", args.path.display()))
    })?;
    let before = stamp(&path);
    let source = PushSource {
        storage: Arc::new(storage),
        name: path.display().to_string(),
        is_unchanged: Arc::new(move || stamp(&path) == before),
    };
    let records = args.objects.cache_directory().map(|directory| directory.join("push"));
    let options = PushOptions { replace: args.replace, verify: args.verify, records };
    let size = source.storage.len().ok();
    let shown = Progress::new(args.progress.visibility(), size);
    let is_interrupted = || signals::stop_if_interrupted().is_err();
    let pushed = push(
        &source,
        &url,
        &args.objects.settings(),
        &options,
        |done| shown.set(done, 0),
        &is_interrupted,
    );
    shown.clear();
    let pushed = pushed.map_err(|error| CommandError::new(error.to_string()))?;
    if pushed.resumed > 0 {
        warn(&format!("{} bytes had been sent before", pushed.resumed));
    }
    let mut output = Output::new();
    output.line(&format!("{url}: {} bytes", pushed.size))?;
    output.finish()?;
    Ok(Outcome::Success)
}

/// Length and times of a file: a writer changes them. Those of a device stay.
fn stamp(path: &Path) -> Option<(u64, i64, i64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}
