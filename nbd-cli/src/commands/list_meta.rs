//! `nbd-cli list-meta`: the metadata contexts that a server offers for an export.

use clap::Args;
use nbd_jobs::tasks;
use nbd_proto::NbdUri;
use serde::Serialize;

use crate::async_runtime::runtime;
use crate::connect::{ServerArgs, failed};
use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat, printable};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli list-meta nbd://localhost/disk
  nbd-cli list-meta nbd://localhost/disk qemu:dirty-bitmap:
  nbd-cli list-meta --json 'nbd+unix:///disk?socket=/run/nbd.sock' base: qemu:";

/// Arguments of `nbd-cli list-meta`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ListMetaArgs {
    /// The export, as an NBD URI.
    pub uri: NbdUri,

    /// Full names (base:allocation) or namespaces (qemu:, qemu:dirty-bitmap:); none for all.
    pub queries: Vec<String>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

#[derive(Serialize)]
struct ContextsReport<'a> {
    #[serde(rename = "export-name")]
    export_name: &'a str,
    contexts: Vec<&'a str>,
}

pub(crate) fn run(args: &ListMetaArgs) -> Result<Outcome, CommandError> {
    args.server.check([&args.uri])?;
    let connector = args.server.connector(&args.uri);
    let listing = connector.list_meta_contexts(&args.queries);
    let contexts = tasks::block_on(&runtime()?, listing)
        .map_err(|error| failed(&args.uri, "list the metadata contexts of", &error))?;
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Text => {
            for context in &contexts {
                output.line(&printable(context.as_str()))?;
            }
        }
        ReportFormat::Json => output.json(&ContextsReport {
            export_name: &args.uri.export_name,
            contexts: contexts.iter().map(|context| context.as_str()).collect(),
        })?,
    }
    output.finish()?;
    Ok(Outcome::Success)
}
