//! Words and lines of the commands.

use std::sync::Arc;

use nbd_jobs::{JobContext, JobError};
use nbd_objects::repo::Id;
use serde::Serialize;

use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat};
use crate::progress::{RateArgs, SummaryArgs};
use crate::shown::Shown;

pub(super) fn id(text: &str) -> Result<Id, String> {
    text.parse().map_err(|()| "an identity has 32 hexadecimal digits".to_owned())
}

pub(super) fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<f64>().ok();
    let number = number.filter(|number| (0.0..=100.0).contains(number));
    number.ok_or_else(|| "give a part from 0% to 100%".to_owned())
}

/// `1 backup`, `2 backups`.
pub(super) fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Prints one line.
pub(super) fn line(text: &str) -> Result<Outcome, CommandError> {
    let mut output = Output::new();
    output.line(text)?;
    output.finish()?;
    Ok(Outcome::Success)
}

/// Prints each file of a job as soon as it is done, or all at the end as JSON.
pub(super) struct Teller<T> {
    shown: Arc<Shown>,
    format: Option<ReportFormat>,
    files: Vec<T>,
    printed: Result<(), CommandError>,
}

impl<T: Serialize> Teller<T> {
    pub(super) fn new(args: SummaryArgs) -> Self {
        let (shown, format) = (Shown::new(args.visibility()), args.format());
        Self { shown, format, files: Vec::new(), printed: Ok(()) }
    }

    /// The context of the job.
    pub(super) fn context(&self, rate: &RateArgs) -> JobContext {
        JobContext { rate_limit: rate.limit(), ..self.shown.context() }
    }

    /// Tells a file, which is `described` as a line.
    pub(super) fn tell(&mut self, file: T, described: impl FnOnce() -> String) {
        self.shown.clear();
        match self.format {
            Some(ReportFormat::Text) if self.printed.is_ok() => {
                self.printed = line(&described()).map(drop);
            }
            _ => self.files.push(file),
        }
    }

    /// Ends with the result of the job. What was done before an error is told, too.
    pub(super) fn finish(self, result: Result<(), JobError>) -> Result<(), CommandError> {
        self.shown.clear();
        if let Some(ReportFormat::Json) = self.format {
            let mut output = Output::new();
            output.json(&self.files)?;
            output.finish()?;
        }
        result?;
        self.printed
    }
}
