//! `nbd-cli tls renew`: certificates that end soon get a new term.
//!
//! Keys stay as they are: a certificate and a key cannot be replaced in one step, and a server that
//! is started in between would find two files that do not belong together.

use std::path::{Path, PathBuf};

use clap::Args;
use nbd_proto::tls::CA_CERTIFICATE_FILE;
use openssl::x509::{X509, X509Ref};

use super::certificate::{self, Request, Role, SECONDS_PER_DAY};
use super::credentials::{
    Authority, certificate_file, certificates, directories, failed, file_names, missing,
};
use super::files::{self, Existing, NewFile};
use super::issue::MAX_DAYS;
use super::names::host_names;
use crate::date::date;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, printable, warn};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli tls renew pki                      what ends within 30 days
  nbd-cli tls renew --within 90 pki
  nbd-cli tls renew --all --days 730 pki     everything, certificates for two years

Renews certificates in the directory of the authority and directly below it, the authority's own
included, and names the files that were written. Names, usages and keys stay the same, so that a
daily run is safe, and a new file can be handed out at any time. A running server reads its files
again on SIGHUP.";

/// Arguments of `nbd-cli tls renew`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RenewArgs {
    /// Directory of the authority, created by 'tls init'.
    #[arg(default_value = ".")]
    pub directory: PathBuf,

    /// Renew certificates that end within so many days.
    #[arg(long, value_name = "DAYS", default_value_t = 30, conflicts_with = "all",
          value_parser = clap::value_parser!(u32).range(0..=MAX_DAYS))]
    pub within: u32,

    /// Renew every certificate.
    #[arg(long)]
    pub all: bool,

    /// Days for which servers and clients are valid; by default as many as before. The authority
    /// keeps its term.
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS))]
    pub days: Option<u32>,
}

impl RenewArgs {
    fn is_due(&self, certificate: &X509Ref) -> bool {
        let limit = certificate::now() + u64::from(self.within) * SECONDS_PER_DAY;
        self.all || certificate::seconds(certificate.not_after()) <= limit
    }
}

pub(super) fn run(args: &RenewArgs) -> Result<Outcome, CommandError> {
    if !args.directory.is_dir() {
        return Err(missing(&args.directory));
    }
    let lock = files::lock(&args.directory)?;
    let mut authority = Authority::load(&args.directory)?;
    let mut output = Output::new();
    if args.is_due(&authority.certificate) {
        let days = certificate::lifetime_days(&authority.certificate);
        let subject = authority.certificate.subject_name();
        authority.certificate = certificate::self_signed(subject, &authority.key, days)
            .map_err(|error| failed(&error))?;
        let path = args.directory.join(CA_CERTIFICATE_FILE);
        let file = certificate_file(path, &authority.certificate)?;
        files::write(&lock, std::slice::from_ref(&file), Existing::Replace)?;
        report(&mut output, &file.path, &authority.certificate)?;
    }
    drop(lock);
    for directory in directories(&args.directory)? {
        let lock = files::lock(&directory)?;
        let mut renewed = Vec::new();
        renewed.extend(copy_of_authority(&directory, &authority)?);
        for role in [Role::Server, Role::Client] {
            renewed.extend(leaf(args, &directory.join(file_names(role).0), role, &authority)?);
        }
        for (file, certificate) in renewed {
            files::write(&lock, std::slice::from_ref(&file), Existing::Replace)?;
            report(&mut output, &file.path, &certificate)?;
        }
    }
    output.finish()?;
    Ok(Outcome::Success)
}

/// Returns the authority's certificate for a directory that has an older one with the same key,
/// also one that an interrupted run left.
fn copy_of_authority(
    directory: &Path,
    authority: &Authority,
) -> Result<Option<(NewFile, X509)>, CommandError> {
    let path = directory.join(CA_CERTIFICATE_FILE);
    let Some(present) = certificates(&path)? else { return Ok(None) };
    let is_old = |certificate: &X509| {
        certificate.public_key().is_ok_and(|key| key.public_eq(&authority.key))
            && certificate.to_der().ok() != authority.certificate.to_der().ok()
    };
    match present.as_slice() {
        [only] if is_old(only) => {
            let file = certificate_file(path, &authority.certificate)?;
            Ok(Some((file, authority.certificate.clone())))
        }
        several if several.iter().any(is_old) => {
            warn(&format!(
                "'{}' has several certificates, and an old one of this authority among them: \
                 replace that one by hand",
                path.display()
            ));
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Returns the new certificate of a server or a client if it is due and from this authority.
fn leaf(
    args: &RenewArgs,
    path: &Path,
    role: Role,
    authority: &Authority,
) -> Result<Option<(NewFile, X509)>, CommandError> {
    let Some(present) = certificates(path)? else { return Ok(None) };
    let [old] = present.as_slice() else {
        warn(&format!("'{}' has several certificates and is left as it is", path.display()));
        return Ok(None);
    };
    if !args.is_due(old) {
        return Ok(None);
    }
    if !old.verify(&authority.key).unwrap_or(false) {
        warn(&format!(
            "'{}' ends soon, and another authority issued it: renew it there",
            path.display()
        ));
        return Ok(None);
    }
    let Ok(names) = host_names(old) else {
        warn(&format!(
            "'{}' has names that are neither DNS names nor addresses: issue a new one with the \
             program that made it",
            path.display()
        ));
        return Ok(None);
    };
    let key = old.public_key().map_err(|error| failed(&error))?;
    let subject = old.subject_name();
    let days = args.days.unwrap_or_else(|| certificate::lifetime_days(old));
    let request = Request { role, subject, names: &names, key: &key, days };
    let new = authority.issue(&request)?;
    Ok(Some((certificate_file(path.to_owned(), &new)?, new)))
}

fn report(output: &mut Output, path: &Path, certificate: &X509Ref) -> Result<(), CommandError> {
    let end = date(certificate::seconds(certificate.not_after()));
    output.line(&format!("{}: valid until {end}", printable(&path.display().to_string())))
}
