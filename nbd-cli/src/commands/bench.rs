//! `nbd-cli bench`: measures a server under load, and verifies its data.

mod arguments;
mod load;
mod sizes;
mod text;

use std::io::{IsTerminal as _, Write as _};

use nbd_jobs::JobContext;
use nbd_jobs::bench::{BenchInterval, BenchReport};

pub use self::arguments::BenchArgs;
use self::load::options;
use crate::async_runtime::block_on;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat, unless_closed};
use crate::progress::Visibility;
use crate::shown::warnings;
use crate::signals;

pub(crate) fn run(args: &BenchArgs) -> Result<Outcome, CommandError> {
    let options = options(args)?;
    let cancellation = signals::cancellation();
    let context = JobContext { observer: warnings(), cancellation, ..JobContext::default() };
    let is_shown = match args.progress.visibility() {
        Visibility::Always => true,
        Visibility::Numbers(_) => {
            let why = "bench does not report percents; give --progress without a file descriptor";
            return Err(CommandError::new(why));
        }
        Visibility::Never => false,
        Visibility::IfTerminal => std::io::stderr().is_terminal(),
    };
    let live = |interval: &BenchInterval| {
        if is_shown {
            // A closed standard error is not an error.
            let _ = writeln!(std::io::stderr(), "{}", text::live(interval));
        }
    };
    let bench = async { Ok(nbd_jobs::bench::bench(&args.uri, &options, &context, live).await?) };
    let report = block_on(bench)?;
    unless_closed(print(args, &report))?;
    conclude(&report)
}

fn print(args: &BenchArgs, report: &BenchReport) -> Result<(), CommandError> {
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(report)?,
        ReportFormat::Text => {
            for line in text::report(report) {
                output.line(&line)?;
            }
        }
    }
    output.finish()
}

/// Returns the exit code of a run.
fn conclude(report: &BenchReport) -> Result<Outcome, CommandError> {
    if let Some(verify) = &report.verify
        && verify.bad_blocks > 0
    {
        let first = verify.examples.first().map_or_else(String::new, |block| {
            format!(", such as the one at offset {}: found {}", block.offset, block.found)
        });
        return Err(CommandError::new(format!(
            "{} does not contain the written data: {} block(s) are wrong{first}",
            report.uri, verify.bad_blocks
        )));
    }
    if report.interrupted {
        signals::stop_if_interrupted()?;
    }
    Ok(Outcome::Success)
}
