//! `nbd-cli tls init`, `server` and `client`: new certificates with their keys.

use std::path::PathBuf;

use clap::Args;
use nbd_jobs::certificates::{
    HostName, Issue, Issued, NewAuthority, Role, issue, new_authority, parse_text, server_name,
};
use nbd_jobs::date::date;

use super::existing::existing;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, printable};
use crate::shown::warnings;

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

    /// Days for which the certificate is valid; it expires with its authority at the latest.
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
    let mut authority = NewAuthority::new(&args.directory);
    authority.name = args.name.as_deref();
    authority.days = args.days;
    authority.existing = existing(args.force);
    report(&new_authority(&authority, &*warnings())?)
}

pub(super) fn server(args: &ServerArgs) -> Result<Outcome, CommandError> {
    let first = args.names.first().map(ToString::to_string).unwrap_or_default();
    let name = server_name(&args.names);
    report(&issue(&args.issue.of(Role::Server, &name, &args.names, &first), &*warnings())?)
}

pub(super) fn client(args: &ClientArgs) -> Result<Outcome, CommandError> {
    report(&issue(&args.issue.of(Role::Client, &args.name, &[], &args.name), &*warnings())?)
}

impl IssueArgs {
    fn of<'a>(
        &'a self,
        role: Role,
        name: &'a str,
        names: &'a [HostName],
        directory_name: &'a str,
    ) -> Issue<'a> {
        let mut wanted = Issue::new(&self.authority, role, name);
        wanted.directory = self.output.as_deref();
        wanted.directory_name = directory_name;
        wanted.names = names;
        wanted.organization = self.organization.as_deref();
        wanted.days = self.days;
        wanted.existing = existing(self.force);
        wanted
    }
}

/// Prints the names of the written files, one per line.
fn report(issued: &Issued) -> Result<Outcome, CommandError> {
    let mut output = Output::new();
    for path in &issued.files {
        output.line(&printable(&path.display().to_string()))?;
    }
    output.line(&format!("valid until {}", date(issued.valid_until)))?;
    output.finish()?;
    Ok(Outcome::Success)
}
