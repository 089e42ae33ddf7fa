//! `nbd-cli tls renew`: renews certificates that expire soon.

use std::path::PathBuf;

use clap::Args;
use nbd_jobs::certificates::{Due, Renewal, renew};
use nbd_jobs::date::date;

use super::issue::MAX_DAYS;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, printable};
use crate::shown::warnings;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli tls renew pki                      those that end within 30 days
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

    /// Renew certificates that expire within this number of days.
    #[arg(long, value_name = "DAYS", default_value_t = 30, conflicts_with = "all",
          value_parser = clap::value_parser!(u32).range(0..=MAX_DAYS))]
    pub within: u32,

    /// Renew every certificate.
    #[arg(long)]
    pub all: bool,

    /// Days for which the certificates of servers and clients are valid; by default as many as
    /// before. The authority keeps its period of validity.
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=MAX_DAYS))]
    pub days: Option<u32>,
}

pub(super) fn run(args: &RenewArgs) -> Result<Outcome, CommandError> {
    let due = if args.all { Due::All } else { Due::WithinDays(args.within) };
    let mut renewal = Renewal::new(&args.directory, due);
    renewal.days = args.days;
    let mut output = Output::new();
    let mut written = Ok(());
    let renewed = renew(&renewal, &*warnings(), |path, end| {
        let line = format!("{}: valid until {}", printable(&path.display().to_string()), date(end));
        if written.is_ok() {
            written = output.line(&line);
        }
    });
    renewed?;
    written?;
    output.finish()?;
    Ok(Outcome::Success)
}
