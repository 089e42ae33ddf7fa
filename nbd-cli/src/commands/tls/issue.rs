//! `nbd-cli tls init`, `server` and `client`: new certificates with their keys.

use std::path::{Component, Path, PathBuf};

use clap::Args;
use nbd_proto::tls::CA_CERTIFICATE_FILE;

use super::certificate::{self, Request, Role};
use super::credentials::{
    Authority, CA_KEY_FILE, certificate_file, certificates, failed, file_names, key_file,
};
use super::files::{self, Existing, NewFile};
use super::names::{HostName, common_name, parse_text};
use crate::date::date;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, printable};

const INIT_HELP: &str = "\
Examples:
  nbd-cli tls init pki
  nbd-cli tls init --name 'Example storage' --days 7300 /var/lib/nbd-pki

Creates DIR with ca-key.pem, which issues certificates, and ca-cert.pem, which every server and
client needs to check them.";

const SERVER_HELP: &str = "\
Examples:
  nbd-cli tls server --authority pki vmhost vmhost.example.com 192.0.2.7 2001:db8::7
  nbd-cli tls server --authority pki --output /etc/pki/nbd localhost

Writes ca-cert.pem, server-cert.pem and server-key.pem for --tls-certificates of 'serve'. Clients
accept the server under these names and addresses only.";

const CLIENT_HELP: &str = "\
Examples:
  nbd-cli tls client --authority pki laptop-1
  nbd-cli tls client --authority pki --organization Example laptop-2

Writes ca-cert.pem, client-cert.pem and client-key.pem for --tls-certificates of a client. NAME is
the common name, as in --tls-authz 'CN=laptop-*' of 'serve'.";

/// Longest validity in days.
pub(super) const MAX_DAYS: i64 = 36_500;

/// Arguments of `nbd-cli tls init`.
#[derive(Debug, Args)]
#[command(after_help = INIT_HELP)]
pub struct InitArgs {
    /// Directory of the new authority.
    pub directory: PathBuf,

    /// Name of the authority; one with random digits by default.
    #[arg(long, value_name = "TEXT", value_parser = parse_text)]
    pub name: Option<String>,

    /// Days for which it is valid.
    #[arg(long, value_name = "DAYS", default_value_t = 3650,
          value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS))]
    pub days: u32,

    /// Replace an existing authority: the certificates that it issued become useless.
    #[arg(long)]
    pub force: bool,
}

/// Common arguments of `nbd-cli tls server` and `client`.
#[derive(Debug, Args)]
pub struct IssueArgs {
    /// Directory of the authority, created by 'tls init'.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub authority: PathBuf,

    /// Directory for the files; by default one in that of the authority, with the (first) NAME.
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,

    /// Organization (O) in the distinguished name.
    #[arg(long, value_name = "TEXT", value_parser = parse_text)]
    pub organization: Option<String>,

    /// Days for which the certificate is valid; it ends with its authority at the latest.
    #[arg(long, value_name = "DAYS", default_value_t = 365,
          value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS))]
    pub days: u32,

    /// Replace existing files.
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `nbd-cli tls server`.
#[derive(Debug, Args)]
#[command(after_help = SERVER_HELP)]
pub struct ServerArgs {
    /// DNS names and addresses of the server; *.example.com stands for one label.
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<HostName>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub issue: IssueArgs,
}

/// Arguments of `nbd-cli tls client`.
#[derive(Debug, Args)]
#[command(after_help = CLIENT_HELP)]
pub struct ClientArgs {
    /// Name of the client.
    #[arg(value_parser = parse_text)]
    pub name: String,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub issue: IssueArgs,
}

pub(super) fn init(args: &InitArgs) -> Result<Outcome, CommandError> {
    let make = || {
        let key = certificate::new_key()?;
        let name = args.name.clone().map_or_else(|| certificate::authority_name(&key), Ok)?;
        let subject = certificate::subject(None, &name)?;
        let certificate = certificate::self_signed(&subject, &key, args.days)?;
        Ok((key, certificate))
    };
    let (key, certificate) = make().map_err(|error| failed(&error))?;
    let lock = files::create_and_lock(&args.directory)?;
    let files = [
        key_file(args.directory.join(CA_KEY_FILE), &key)?,
        certificate_file(args.directory.join(CA_CERTIFICATE_FILE), &certificate)?,
    ];
    files::write(&lock, &files, Existing::from_force_flag(args.force))?;
    report(&files, certificate::seconds(certificate.not_after()))
}

pub(super) fn server(args: &ServerArgs) -> Result<Outcome, CommandError> {
    let name = common_name(&args.names);
    let first = args.names.first().map(ToString::to_string).unwrap_or_default();
    issue(&args.issue, Role::Server, &name, &args.names, &first)
}

pub(super) fn client(args: &ClientArgs) -> Result<Outcome, CommandError> {
    issue(&args.issue, Role::Client, &args.name, &[], &args.name)
}

fn issue(
    args: &IssueArgs,
    role: Role,
    name: &str,
    names: &[HostName],
    directory_name: &str,
) -> Result<Outcome, CommandError> {
    let directory = match &args.output {
        Some(directory) => directory.clone(),
        None => args.authority.join(plain_name(directory_name)?),
    };
    let authority = Authority::load(&args.authority)?;
    let make = || {
        let key = certificate::new_key()?;
        let subject = certificate::subject(args.organization.as_deref(), name)?;
        Ok((certificate::public_half(&key)?, key, subject))
    };
    let (public, key, subject) = make().map_err(|error| failed(&error))?;
    let request = Request { role, subject: &subject, names, key: &public, days: args.days };
    let certificate = authority.issue(&request)?;
    let lock = files::create_and_lock(&directory)?;
    let (certificate_name, key_name) = file_names(role);
    let existing = Existing::from_force_flag(args.force);
    let mut files = Vec::new();
    if needs_authority(&directory.join(CA_CERTIFICATE_FILE), &authority, existing)? {
        let path = directory.join(CA_CERTIFICATE_FILE);
        files.push(certificate_file(path, &authority.certificate)?);
    }
    files.push(key_file(directory.join(key_name), &key)?);
    files.push(certificate_file(directory.join(certificate_name), &certificate)?);
    files::write(&lock, &files, existing)?;
    report(&files, certificate::seconds(certificate.not_after()))
}

/// Returns whether a directory lacks the certificate of the authority.
fn needs_authority(
    path: &Path,
    authority: &Authority,
    existing: Existing,
) -> Result<bool, CommandError> {
    let Some(present) = certificates(path)? else { return Ok(true) };
    let same = |certificate: &openssl::x509::X509| {
        certificate.to_der().ok() == authority.certificate.to_der().ok()
    };
    if present.iter().any(same) {
        return Ok(false);
    }
    if existing == Existing::Replace {
        return Ok(true);
    }
    Err(CommandError::new(format!(
        "'{}' is that of another authority; choose another directory with --output, or add --force \
         to replace it",
        path.display()
    )))
}

/// A name that can be that of a directory, and no path.
fn plain_name(name: &str) -> Result<&Path, CommandError> {
    let path = Path::new(name);
    let mut components = path.components();
    let is_plain = matches!(components.next(), Some(Component::Normal(first)) if first == name)
        && components.next().is_none()
        && !name.contains('*');
    if is_plain {
        Ok(path)
    } else {
        Err(CommandError::new(format!(
            "'{name}' cannot be the name of a directory; give one for the files with --output"
        )))
    }
}

/// Names the files that were written, one on each line.
fn report(files: &[NewFile], end: u64) -> Result<Outcome, CommandError> {
    let mut output = Output::new();
    for file in files {
        output.line(&printable(&file.path.display().to_string()))?;
    }
    output.line(&format!("valid until {}", date(end)))?;
    output.finish()?;
    Ok(Outcome::Success)
}

#[cfg(test)]
mod tests {
    use super::plain_name;

    #[test]
    fn files_go_to_a_directory_of_the_authority() {
        for name in ["vmhost", "laptop 1", "::1", "ca"] {
            assert!(plain_name(name).is_ok(), "{name}");
        }
        for name in ["..", ".", "/etc", "a/b", "a/", "*.example.com"] {
            assert!(plain_name(name).is_err(), "{name}");
        }
    }
}
