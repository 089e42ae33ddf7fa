//! `nbd-cli info`: the properties of a server and its exports.
//!
//! Text and JSON are those of nbdinfo, key by key, so that scripts written for it continue to work.

mod property;

use std::ffi::OsString;
use std::io::Write as _;

use clap::Args;
use nbd_client::{Scope, ServerInfo};
use nbd_jobs::server_report::{ExportReport, ServerReport, content_of};
use nbd_jobs::tasks;
use nbd_proto::NbdUri;

use super::image::info::draw_chain;
use crate::async_runtime::runtime;
use crate::connect::{ServerArgs, explain_unknown_export};
use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat, printable, unless_closed};
use property::Property;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli info nbd://localhost/disk
  nbd-cli info --list --json nbd://localhost
  nbd-cli info --tls-certificates /etc/pki/nbd nbds://backup.example.org/disk
  nbd-cli info --size 'nbd+unix:///disk?socket=/run/nbd.sock'
  nbd-cli info --can trim nbd://localhost/disk && echo it trims
  nbd-cli info --is read-only nbd://localhost/disk
  nbd-cli info --graph overlay.qcow2

Exit codes: 0 yes or success, 2 no (--can, --is, --has), 1 error; with --list also if the server
refuses one of the exports, while the others are shown.";

/// Arguments of `nbd-cli info`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct InfoArgs {
    /// The server and export, as an NBD URI.
    #[arg(required_unless_present = "graph")]
    pub uri: Option<NbdUri>,

    /// Draw an image and the chain of backing files below it, with their data files, sizes, space
    /// and dates: a file, which may be in use, or an export as an NBD URI.
    #[arg(
        long,
        value_name = "IMAGE",
        num_args = 0..=1,
        conflicts_with_all = ["json", "list", "question", "content", "no_content"]
    )]
    pub graph: Option<Option<OsString>>,

    /// With --graph, trust the image: follow the names of backing and data files in it to any
    /// directory and to servers.
    #[arg(long, requires = "graph")]
    pub trust_image: bool,

    /// Print JSON, with the keys of nbdinfo.
    #[arg(long)]
    pub json: bool,

    /// Describe all exports that the server lists.
    #[arg(short = 'L', long)]
    pub list: bool,

    /// Print only the size in bytes.
    #[arg(long, conflicts_with = "list", group = "question")]
    pub size: bool,

    /// Exit with 0 if the export has this capability, with 2 if not.
    #[arg(long, value_name = "X", value_enum, conflicts_with = "list", group = "question")]
    pub can: Option<Property>,

    /// Exit with 0 if this is true, with 2 if not; the values are those of --can.
    #[arg(
        long,
        value_name = "X",
        value_enum,
        hide_possible_values = true,
        conflicts_with = "list",
        group = "question"
    )]
    pub is: Option<Property>,

    /// Exit with 0 if the server has this, with 2 if not; the values are those of --can.
    #[arg(
        long,
        value_name = "X",
        value_enum,
        hide_possible_values = true,
        conflicts_with = "list",
        group = "question"
    )]
    pub has: Option<Property>,

    /// Detect the content of the export from its first bytes, also with --list.
    #[arg(long, conflicts_with = "no_content")]
    pub content: bool,

    /// Do not read from the export.
    #[arg(long)]
    pub no_content: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

pub(crate) fn run(args: &InfoArgs) -> Result<Outcome, CommandError> {
    match (&args.graph, &args.uri) {
        (Some(Some(_)), Some(_)) => {
            Err(CommandError::new("--graph draws one image; omit one of the two"))
        }
        (Some(Some(image)), None) => draw_chain(image, args.trust_image, &args.server),
        (Some(None), Some(uri)) => {
            draw_chain(uri.to_string().as_ref(), args.trust_image, &args.server)
        }
        (None, Some(uri)) => {
            args.server.check([uri])?;
            tasks::block_on(&runtime()?, info(args, uri))
        }
        (_, None) => Err(CommandError::new("give an NBD URI, or --graph with an image")),
    }
}

async fn info(args: &InfoArgs, uri: &NbdUri) -> Result<Outcome, CommandError> {
    let scope = if args.list { Scope::AllExports } else { Scope::ThisExport };
    let connector = args.server.connector(uri);
    let server = match connector.inspect(scope).await {
        Ok(server) => server,
        Err(error) => return Err(explain_unknown_export(&connector, uri, error).await),
    };
    if let Some(property) = args.can.or(args.is).or(args.has) {
        let answer = property.holds(&server, only_export(&server, uri)?);
        return Ok(if answer { Outcome::Success } else { Outcome::False });
    }
    if args.size {
        let size = only_export(&server, uri)?.size;
        let mut output = Output::new();
        output.line(&size.to_string()).and_then(|()| output.finish())?;
    } else {
        let mut report = ServerReport::new(&server, uri);
        if args.content || !(args.list || args.no_content) {
            for export in &mut report.exports {
                export.content = content_of(&connector, &export.name).await;
            }
        }
        unless_closed(print(&report, ReportFormat::from_json_flag(args.json)))?;
    }
    // As in nbdinfo: the others are shown, and the exit code reports the refused one.
    for refused in &server.refused {
        let (name, reason) = (printable(&refused.name), printable(&refused.reason));
        let _ = writeln!(std::io::stderr(), "nbd-cli: the export '{name}' is refused: {reason}");
    }
    Ok(if server.refused.is_empty() { Outcome::Success } else { Outcome::Status(1) })
}

fn print(report: &ServerReport, format: ReportFormat) -> Result<(), CommandError> {
    let mut output = Output::new();
    match format {
        ReportFormat::Json => output.json(report)?,
        ReportFormat::Text => text(report, &mut output)?,
    }
    output.finish()
}

/// Writes the report in the format of nbdinfo.
fn text(report: &ServerReport, output: &mut Output) -> Result<(), CommandError> {
    output.line(&format!("protocol: {}", report.protocol()))?;
    report.exports.iter().try_for_each(|export| export_text(export, output))
}

fn export_text(export: &ExportReport, output: &mut Output) -> Result<(), CommandError> {
    let mut line = |text: String| output.line(&text);
    line(format!("export=\"{}\":", printable(&export.name)))?;
    if let Some(description) = &export.description {
        line(format!("\tdescription: {}", printable(description)))?;
    }
    match export.size_text.ends_with(|last: char| last.is_ascii_digit()) {
        true => line(format!("\texport-size: {}", export.size))?,
        false => line(format!("\texport-size: {} ({})", export.size, export.size_text))?,
    }
    if let Some(content) = export.content {
        line(format!("\tcontent: {content}"))?;
    }
    line(format!("\turi: {}", export.uri))?;
    if !export.contexts.is_empty() {
        line("\tcontexts:".to_owned())?;
    }
    for context in &export.contexts {
        line(format!("\t\t{}", printable(context)))?;
    }
    for (name, value) in export.abilities() {
        line(format!("\t{name}: {value}"))?;
    }
    if let Some(sizes) = export.block_sizes {
        line(format!("\tblock_size_minimum: {}", sizes.minimum))?;
        line(format!("\tblock_size_preferred: {}", sizes.preferred))?;
        line(format!("\tblock_size_maximum: {}", sizes.maximum_payload))?;
    }
    Ok(())
}

fn only_export<'a>(
    server: &'a ServerInfo,
    uri: &NbdUri,
) -> Result<&'a nbd_client::ExportInfo, CommandError> {
    server.exports.first().ok_or_else(|| {
        CommandError::new(format!(
            "{uri} sent no information about the export; try 'nbd-cli info --list'"
        ))
    })
}
