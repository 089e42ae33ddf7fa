//! Copies a disk: `cargo run -p nbd-jobs --example copy -- SOURCE DESTINATION`.
//!
//! Both are an NBD URI, a file, a block device, `-` or `null:`, as for `nbd-cli copy`.

use std::error::Error;
use std::sync::Arc;

use nbd_jobs::{CopyOptions, JobContext, Location, Observer, Progress, copy};

/// Prints progress and warnings.
struct Printed;

impl Observer for Printed {
    fn progress(&self, progress: &Progress) {
        eprintln!("{} of {:?} bytes", progress.done, progress.total);
    }

    fn warning(&self, text: &str) {
        eprintln!("warning: {text}");
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    run(std::env::args().skip(1)).await
}

pub(crate) async fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), Box<dyn Error>> {
    let from: Location = arguments.next().ok_or("name the source")?.parse()?;
    let to: Location = arguments.next().ok_or("name the destination")?.parse()?;
    let context = JobContext { observer: Arc::new(Printed), ..JobContext::default() };
    let copied = copy(&from, &to, &CopyOptions::default(), &context).await?;
    eprintln!("copied {} bytes, {} of them holes", copied.size, copied.holes);
    Ok(())
}
