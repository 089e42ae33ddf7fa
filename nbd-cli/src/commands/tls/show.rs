//! `nbd-cli tls show`: the contents and the defects of certificates and keys.

use std::path::PathBuf;

use clap::Args;
use nbd_jobs::certificates::{CertificateInfo, CertificateKind, CredentialInfo, Validity, inspect};
use nbd_jobs::date::date_and_time;
use serde::Serialize;

use super::issue::MAX_DAYS;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat, printable};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli tls show pki
  nbd-cli tls show --within 90 /etc/pki/nbd
  nbd-cli tls show --json pki | jq -r '.[] | select(.status != \"valid\") | .file'

Describes ca-cert.pem, server-cert.pem, client-cert.pem and keys.psk in a directory and directly
below it, or one file. Keys are never shown.";

/// Arguments of `nbd-cli tls show`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ShowArgs {
    /// A directory of certificates or keys, or a file.
    #[arg(default_value = ".")]
    pub path: PathBuf,

    /// Report certificates that expire within this number of days as expiring soon.
    #[arg(long, value_name = "DAYS", default_value_t = 30,
          value_parser = clap::value_parser!(u32).range(0..=MAX_DAYS))]
    pub within: u32,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// One certificate, or one file of pre-shared keys.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Entry {
    Certificate(Box<Certificate>),
    Keys { file: String, kind: &'static str, users: Vec<String>, problems: Vec<String> },
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Certificate {
    file: String,
    kind: &'static str,
    subject: String,
    issuer: String,
    names: Vec<String>,
    not_before: String,
    not_after: String,
    /// Days from now to the end, rounded up; negative after it.
    days_left: i64,
    status: &'static str,
    sha256: String,
    problems: Vec<String>,
}

pub(super) fn run(args: &ShowArgs) -> Result<Outcome, CommandError> {
    let entries: Vec<_> = inspect(&args.path, args.within)?.into_iter().map(Entry::from).collect();
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&entries)?,
        ReportFormat::Text => entries.iter().try_for_each(|entry| text(&mut output, entry))?,
    }
    output.finish()?;
    Ok(Outcome::Success)
}

impl From<CredentialInfo> for Entry {
    fn from(info: CredentialInfo) -> Self {
        match info {
            CredentialInfo::Certificate(info) => Self::Certificate(Box::new((*info).into())),
            CredentialInfo::Keys(info) => Self::Keys {
                file: info.file.display().to_string(),
                kind: "keys",
                users: info.users,
                problems: info.problems,
            },
        }
    }
}

impl From<CertificateInfo> for Certificate {
    fn from(info: CertificateInfo) -> Self {
        Self {
            file: info.file.display().to_string(),
            kind: match info.kind {
                CertificateKind::Authority => "authority",
                CertificateKind::Server => "server",
                CertificateKind::Client => "client",
                CertificateKind::Intermediate => "intermediate",
                _ => "certificate",
            },
            subject: info.subject,
            issuer: info.issuer,
            names: info.names.iter().map(ToString::to_string).collect(),
            not_before: date_and_time(info.not_before),
            not_after: date_and_time(info.not_after),
            days_left: info.days_left,
            status: match info.validity {
                Validity::Expired => "expired",
                Validity::NotYetValid => "not-yet-valid",
                Validity::EndsSoon => "ends-soon",
                _ => "valid",
            },
            sha256: info.sha256,
            problems: info.problems,
        }
    }
}

fn text(output: &mut Output, entry: &Entry) -> Result<(), CommandError> {
    let problems = match entry {
        Entry::Keys { file, users, problems, .. } => {
            output.line(&format!("{}: keys", printable(file)))?;
            output.line(&format!("    users: {}", printable(&users.join(", "))))?;
            problems
        }
        Entry::Certificate(shown) => {
            let (file, subject) = (printable(&shown.file), printable(&shown.subject));
            output.line(&format!("{file}: {} {subject}", shown.kind))?;
            if !shown.names.is_empty() {
                output.line(&format!("    names: {}", shown.names.join(", ")))?;
            }
            if shown.issuer != shown.subject {
                output.line(&format!("    issued by: {}", printable(&shown.issuer)))?;
            }
            output.line(&format!("    valid: {}", validity(shown)))?;
            &shown.problems
        }
    };
    problems.iter().try_for_each(|problem| output.line(&format!("    problem: {problem}")))
}

fn validity(shown: &Certificate) -> String {
    let days = |days: i64| if days == 1 { "1 day".to_owned() } else { format!("{days} days") };
    let end = &shown.not_after;
    match shown.status {
        "expired" => format!("no: it has expired on {end}"),
        "not-yet-valid" => format!("not before {}", shown.not_before),
        "ends-soon" => format!("until {end}: it ends in {}", days(shown.days_left)),
        _ => format!("until {end}, for {}", days(shown.days_left)),
    }
}
