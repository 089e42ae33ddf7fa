//! Backs up a disk while its clients write to it: `cargo run -p nbd-jobs --example backup --
//! CONTROL EXPORT TARGET [BASE]`.
//!
//! `CONTROL` is the socket of `nbd-cli serve --control`. Without `BASE` the backup is a full one,
//! and the bitmap `daily` starts with it; with the previous backup as `BASE`, it is incremental.

use std::error::Error;
use std::path::PathBuf;

use nbd_jobs::{BackupOptions, BackupSource, JobContext, backup};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    run(std::env::args().skip(1)).await
}

pub(crate) async fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), Box<dyn Error>> {
    let socket = PathBuf::from(arguments.next().ok_or("name the control socket")?);
    let export = arguments.next().ok_or("name the export")?;
    let target = PathBuf::from(arguments.next().ok_or("name the new file")?);
    let mut options = BackupOptions::default();
    options.bitmap = Some("daily".to_owned());
    options.base = arguments.next().map(PathBuf::from);
    let source = BackupSource::Checkpoint { socket, export, uri: None };
    let made = backup(&source, &target, &options, &JobContext::default()).await?;
    eprintln!("{} bytes copied, {} unchanged", made.copied, made.unchanged);
    Ok(())
}
