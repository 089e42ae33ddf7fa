//! Reports what a check or gc did.

use nbd_jobs::size::rounded;
use nbd_objects::repo::{Checked, Garbage, Repository};
use serde::Serialize;

use super::args::GcArgs;
use super::text::counted;
use crate::error::CommandError;
use crate::output::{Output, ReportFormat, printable};

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Problem {
    message: String,
    backups: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Check {
    problems: Vec<Problem>,
    backups: u64,
    packs: u64,
    bytes: u64,
    packs_read: u64,
    packs_unneeded: u64,
}

pub(super) fn check(
    repository: &Repository,
    checked: &Checked,
    json: bool,
) -> Result<(), CommandError> {
    let problem = |problem: &nbd_objects::repo::Problem| Problem {
        message: problem.message.clone(),
        backups: problem.backups.iter().map(|(id, name)| format!("{name}@{id}")).collect(),
    };
    let report = Check {
        problems: checked.problems.iter().map(problem).collect(),
        backups: checked.backups,
        packs: checked.packs,
        bytes: checked.bytes,
        packs_read: checked.read,
        packs_unneeded: checked.unneeded,
    };
    let mut output = Output::new();
    match ReportFormat::from_json_flag(json) {
        ReportFormat::Json => output.json(&report)?,
        ReportFormat::Text => {
            for problem in &report.problems {
                output.line(&format!("error: {}", printable(&problem.message)))?;
                for backup in &problem.backups {
                    output.line(&format!("  not whole: {}", printable(backup)))?;
                }
            }
            let result = match report.problems.len() {
                0 => "no errors".to_owned(),
                count => counted(count as u64, "error"),
            };
            output.line(&format!(
                "{}: {result}; {}, {} ({}), {} of them read and {} not needed",
                printable(repository.name()),
                counted(report.backups, "backup"),
                counted(report.packs, "pack"),
                rounded(report.bytes),
                report.packs_read,
                report.packs_unneeded,
            ))?;
        }
    }
    output.finish()
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Gc {
    packs: u64,
    bytes: u64,
    ended_sessions: Vec<String>,
    other_lists: Vec<String>,
}

pub(super) fn garbage(garbage: &Garbage, args: &GcArgs) -> Result<(), CommandError> {
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&Gc {
            packs: garbage.packs,
            bytes: garbage.bytes,
            ended_sessions: garbage.ended.iter().map(ToString::to_string).collect(),
            other_lists: garbage.lists.iter().map(ToString::to_string).collect(),
        })?,
        ReportFormat::Text => {
            for session in &garbage.ended {
                output.line(&format!("ended: the interrupted session {session}"))?;
            }
            let verb = if args.dry_run { "would be deleted" } else { "deleted" };
            let packs = counted(garbage.packs, "pack");
            output.line(&format!("{verb}: {packs}, {}", rounded(garbage.bytes)))?;
        }
    }
    output.finish()
}
