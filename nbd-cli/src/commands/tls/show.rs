//! `nbd-cli tls show`: what certificates and keys say, and what is wrong with them.

use std::path::{Path, PathBuf};

use clap::Args;
use nbd_jobs::certificates::{
    self, CA_KEY_FILE, Role, SECONDS_PER_DAY, certificates, directories, distinguished_name,
    file_names, host_names, missing, private_key,
};
use nbd_proto::tls::{CA_CERTIFICATE_FILE, PSK_FILE, PreSharedKeys};
use openssl::hash::MessageDigest;
use openssl::x509::{X509, X509Ref};
use serde::Serialize;

use super::issue::MAX_DAYS;
use crate::date::date_and_time;
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

    /// Say of certificates that they end soon if they end within so many days.
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
    let mut entries = Vec::new();
    if args.path.is_dir() {
        for directory in directories(&args.path)? {
            for name in names() {
                let path = directory.join(name);
                if path.is_file() {
                    read(args, &path, &mut entries)?;
                }
            }
        }
        if entries.is_empty() {
            let path = args.path.display();
            return Err(CommandError::new(format!(
                "there are no certificates and no keys in '{path}'; 'nbd-cli tls --help' says how \
                 to make them"
            )));
        }
    } else if args.path.exists() {
        read(args, &args.path, &mut entries)?;
    } else {
        return Err(missing(&args.path).into());
    }
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&entries)?,
        ReportFormat::Text => entries.iter().try_for_each(|entry| text(&mut output, entry))?,
    }
    output.finish()?;
    Ok(Outcome::Success)
}

fn names() -> [&'static str; 4] {
    [CA_CERTIFICATE_FILE, file_names(Role::Server).0, file_names(Role::Client).0, PSK_FILE]
}

fn read(args: &ShowArgs, path: &Path, entries: &mut Vec<Entry>) -> Result<(), CommandError> {
    let [authority, server, client, _] = names();
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let (kind, key) = match name {
        _ if path.extension().is_some_and(|extension| extension == "psk") => {
            entries.push(keys(path)?);
            return Ok(());
        }
        _ if name == authority => ("authority", None),
        _ if name == server => ("server", Some(file_names(Role::Server).1)),
        _ if name == client => ("client", Some(file_names(Role::Client).1)),
        _ => ("certificate", None),
    };
    let found = certificates(path)?.ok_or_else(|| missing(path))?;
    for (index, certificate) in found.iter().enumerate() {
        let mut shown = describe(args, path, kind, certificate);
        match (kind, index) {
            ("server" | "client", 0) => {
                shown.problems.extend(key.and_then(|key| key_problem(certificate, path, key)));
                shown.problems.extend(authority_problem(&found, path));
                if kind == "server" && shown.names.is_empty() {
                    shown.problems.push("it has no host name: many clients refuse it".to_owned());
                }
            }
            ("server" | "client", _) => shown.kind = "intermediate",
            // Servers and clients have no key of the authority.
            ("authority", _) if path.with_file_name(CA_KEY_FILE).exists() => {
                shown.problems.extend(key_problem(certificate, path, CA_KEY_FILE));
            }
            _ => {}
        }
        entries.push(Entry::Certificate(Box::new(shown)));
    }
    Ok(())
}

fn describe(
    args: &ShowArgs,
    path: &Path,
    kind: &'static str,
    certificate: &X509Ref,
) -> Certificate {
    let start = certificates::seconds(certificate.not_before());
    let end = certificates::seconds(certificate.not_after());
    let now = certificates::now();
    let status = match end {
        _ if end < now => "expired",
        _ if start > now => "not-yet-valid",
        _ if end <= now + u64::from(args.within) * SECONDS_PER_DAY => "ends-soon",
        _ => "valid",
    };
    let mut problems = Vec::new();
    let names = host_names(certificate).unwrap_or_else(|_| {
        problems.push("it has names of other kinds, which are not shown".to_owned());
        Vec::new()
    });
    let digest = certificate.digest(MessageDigest::sha256());
    let seconds = i64::try_from(end).unwrap_or(i64::MAX) - i64::try_from(now).unwrap_or(0);
    Certificate {
        file: path.display().to_string(),
        kind,
        subject: distinguished_name(certificate.subject_name()),
        issuer: distinguished_name(certificate.issuer_name()),
        names: names.iter().map(ToString::to_string).collect(),
        not_before: date_and_time(start),
        not_after: date_and_time(end),
        days_left: -(-seconds).div_euclid(86_400),
        status,
        sha256: digest
            .iter()
            .flat_map(|digest| digest.iter())
            .map(|b| format!("{b:02x}"))
            .collect(),
        problems,
    }
}

/// What is wrong with the key beside a certificate.
fn key_problem(certificate: &X509Ref, path: &Path, name: &str) -> Option<String> {
    let path = path.with_file_name(name);
    let text = match certificates::read(&path) {
        Ok(Some(text)) => text,
        Ok(None) => return Some(format!("{name} is missing beside it")),
        Err(error) => return Some(error.to_string()),
    };
    let key = match private_key(&text, &path) {
        Ok(key) => key,
        Err(error) => return Some(error.to_string()),
    };
    if !certificate.public_key().is_ok_and(|public| public.public_eq(&key)) {
        return Some(format!("{name} does not belong to it"));
    }
    readable(&path)
}

fn readable(path: &Path) -> Option<String> {
    certificates::readable_by_others(path).then(|| {
        format!("'{}' can be read by every user of this system: chmod 600 it", path.display())
    })
}

/// What is wrong with the authority beside a certificate, for those that it signed directly.
fn authority_problem(chain: &[X509], path: &Path) -> Option<String> {
    let beside = path.with_file_name(CA_CERTIFICATE_FILE);
    let authorities = match certificates(&beside) {
        Ok(Some(authorities)) => authorities,
        Ok(None) => return Some(format!("{CA_CERTIFICATE_FILE} is missing beside it")),
        Err(error) => return Some(error.to_string()),
    };
    let signed = |certificate: &X509| {
        let by = |authority: &X509| authority.public_key().and_then(|key| certificate.verify(&key));
        authorities.iter().any(|authority| by(authority).unwrap_or(false))
    };
    let is_signed = chain.iter().any(signed);
    (!is_signed).then(|| format!("no authority in {CA_CERTIFICATE_FILE} beside it has signed it"))
}

fn keys(path: &Path) -> Result<Entry, CommandError> {
    let text = certificates::read(path)?.ok_or_else(|| missing(path))?;
    let keys = PreSharedKeys::parse(&text).map_err(|error| {
        CommandError::new(format!("'{}' is not a file of keys: {error}", path.display()))
    })?;
    let users = keys.users().map(|user| String::from_utf8_lossy(user).into_owned()).collect();
    let problems = readable(path).into_iter().collect();
    Ok(Entry::Keys { file: path.display().to_string(), kind: "keys", users, problems })
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
