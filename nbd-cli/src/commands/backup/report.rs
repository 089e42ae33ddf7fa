//! The summary of a backup.

use std::fs::Metadata;

use nbd_jobs::BackedUp;
use nbd_jobs::size::rounded;
use serde::Serialize;

use super::args::BackupArgs;
use crate::error::CommandError;
use crate::output::{Output, ReportFormat, printable};

/// The result of a backup. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BackupReport {
    source: String,
    target: String,
    base: Option<String>,
    bitmap: Option<String>,
    size: u64,
    /// Start of this run; above 0 if it resumed an earlier one.
    resumed_at: u64,
    copied: u64,
    zero: u64,
    unchanged: u64,
    /// Bytes compared, if the backup was verified.
    verified: Option<u64>,
    /// Size of the new file; none on a device.
    file_size: Option<u64>,
    seconds: f64,
}

impl BackupReport {
    pub(super) fn new(args: &BackupArgs, made: BackedUp) -> Self {
        Self {
            source: made.uri.to_string(),
            target: args.target.display().to_string(),
            base: args.base.as_ref().map(|path| path.display().to_string()),
            bitmap: args.bitmap.clone(),
            size: made.size,
            resumed_at: made.resumed_at,
            copied: made.copied,
            zero: made.zero,
            unchanged: made.unchanged,
            verified: made.verified,
            file_size: args.target.metadata().ok().filter(Metadata::is_file).map(|it| it.len()),
            seconds: made.took.as_secs_f64(),
        }
    }

    pub(super) fn print(&self, format: ReportFormat) -> Result<(), CommandError> {
        let mut output = Output::new();
        match format {
            ReportFormat::Json => output.json(self)?,
            ReportFormat::Text => {
                let kind = match (&self.base, &self.bitmap) {
                    (Some(_), Some(bitmap)) => format!("incremental by '{}'", printable(bitmap)),
                    _ => "full".to_owned(),
                };
                let mut parts = vec![
                    format!("{} copied", rounded(self.copied)),
                    format!("{} zero", rounded(self.zero)),
                ];
                if self.base.is_some() {
                    parts.push(format!("{} unchanged", rounded(self.unchanged)));
                }
                if self.resumed_at > 0 {
                    parts.push(format!("{} copied before", rounded(self.resumed_at)));
                }
                if let Some(verified) = self.verified {
                    parts.push(format!("{} verified", rounded(verified)));
                }
                let line = format!(
                    "{}: {kind}, {} in {:.1} s: {}",
                    printable(&self.target),
                    rounded(self.size),
                    self.seconds,
                    parts.join(", ")
                );
                output.line(&line)?;
            }
        }
        output.finish()
    }
}
