//! `nbd-cli repo compact`.

use std::sync::{Arc, OnceLock};

use nbd_jobs::repository::repository_error;
use nbd_jobs::size::rounded;
use nbd_objects::repo::{CompactOptions, Compacted, host_name};
use serde::Serialize;

use super::args::CompactArgs;
use super::text::counted;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat, printable, warn};
use crate::progress::Progress;

/// Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    /// Packs of which too little is needed, their bytes, and those of them that are needed.
    packs: u64,
    bytes: u64,
    needed: u64,
    /// Backups that have another map now.
    backups: u64,
    /// Bytes that were written.
    written: u64,
    /// What gc deletes without this, and with it.
    garbage_before: u64,
    garbage: u64,
    /// Backups that stay as they are.
    left: Vec<String>,
    /// Packs of which something cannot be read.
    damaged: Vec<String>,
}

pub(super) async fn run(args: &CompactArgs) -> Result<Outcome, CommandError> {
    let repository = args.store.open().await?;
    let visibility = args.summary.visibility();
    let progress: Arc<OnceLock<Progress>> = Arc::default();
    let shown = Arc::clone(&progress);
    let mut options = CompactOptions::default();
    options.max_unused = args.max_unused / 100.0;
    options.dry_run = args.dry_run;
    options.host = host_name();
    options.on_copied = Some(Arc::new(move |copied, total| {
        let progress = shown.get_or_init(|| Progress::new(visibility, Some(total)));
        progress.set(copied.min(total), 0);
    }));
    let compacted = repository.compact(&options).await;
    if let Some(progress) = progress.get() {
        progress.clear();
    }
    let compacted = compacted.map_err(repository_error)?;
    for id in &compacted.left {
        warn(&format!(
            "the backup {id} stays as it is: packs that it needs are missing, or a gc deletes them; \
             see 'repo check'"
        ));
    }
    for pack in &compacted.damaged {
        warn(&format!("the pack {pack} is damaged and stays; see 'repo check --read-data'"));
    }
    match args.summary.format() {
        None => {}
        Some(format) => report(&compacted, args, repository.name(), format)?,
    }
    Ok(Outcome::Success)
}

fn report(
    compacted: &Compacted,
    args: &CompactArgs,
    name: &str,
    format: ReportFormat,
) -> Result<(), CommandError> {
    let mut output = Output::new();
    match format {
        ReportFormat::Json => output.json(&Report {
            packs: compacted.packs,
            bytes: compacted.bytes,
            needed: compacted.needed,
            backups: compacted.backups,
            written: compacted.written,
            garbage_before: compacted.garbage_before,
            garbage: compacted.garbage,
            left: compacted.left.iter().map(ToString::to_string).collect(),
            damaged: compacted.damaged.clone(),
        })?,
        ReportFormat::Text => {
            output.line(&format!(
                "{}: {} with {}, of which {} are needed",
                printable(name),
                counted(compacted.packs, "pack"),
                rounded(compacted.bytes),
                rounded(compacted.needed)
            ))?;
            if !args.dry_run {
                output.line(&format!(
                    "moved: {}, {} written",
                    counted(compacted.backups, "backup"),
                    rounded(compacted.written)
                ))?;
            }
            let verb = if args.dry_run { "would free" } else { "frees" };
            output.line(&format!(
                "'repo gc' {verb} {} (without this {})",
                rounded(compacted.garbage),
                rounded(compacted.garbage_before)
            ))?;
        }
    }
    output.finish()
}
