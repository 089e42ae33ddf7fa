//! `nbd-cli map`: the block status of an export: data, holes, dirty ranges and so on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use nbd_jobs::chart::{Chart, Class};
use nbd_jobs::tasks;
use nbd_proto::NbdUri;
use nbd_proto::wire::MetaContextName;
use serde::Serialize;

use crate::async_runtime::runtime;
use crate::connect::{ServerArgs, connect, failed};
use crate::context::description;
use crate::drawing::Drawing;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat};
use crate::terminal::ColorChoice;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli map nbd://localhost/disk
  nbd-cli map --chart nbd://localhost/disk
  nbd-cli map --svg disk.svg nbd://localhost/disk
  nbd-cli map --totals --json nbd://localhost/disk
  nbd-cli map --context qemu:dirty-bitmap:monday nbd://localhost/disk

Columns of the text: offset and length in bytes, the value and its meaning.";

/// Arguments of `nbd-cli map`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct MapArgs {
    /// The export, as an NBD URI.
    pub uri: NbdUri,

    /// The metadata context to show.
    #[arg(long, value_name = "NAME", default_value = MetaContextName::BASE_ALLOCATION)]
    pub context: String,

    /// Print JSON.
    #[arg(long, conflicts_with = "chart")]
    pub json: bool,

    /// Print only the number of bytes of each kind.
    #[arg(long, conflicts_with = "chart")]
    pub totals: bool,

    /// Draw the disk, one line per part of it.
    #[arg(long, alias = "picture")]
    pub chart: bool,

    /// Write a picture of the disk (SVG) to a file, or to standard output (-). An existing file is
    /// replaced only if it is a picture of this command.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "totals", "chart"])]
    pub svg: Option<PathBuf>,

    /// Whether to colour the chart.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub color: ColorChoice,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

#[derive(Serialize)]
struct JsonExtent {
    offset: u64,
    length: u64,
    #[serde(rename = "type")]
    kind: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
}

#[derive(Serialize)]
struct JsonTotal {
    size: u64,
    percent: f64,
    #[serde(rename = "type")]
    kind: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
}

/// Maximum number of distinct values that are counted. A context has few, but a server may send
/// 2^64.
const MAX_TOTALS: usize = 65_536;

/// Consumes extents. Only totals and the chart are kept: a disk may have millions of extents.
enum MapPrinter {
    Text,
    Json { first: bool },
    Totals { format: ReportFormat, bytes: BTreeMap<u64, u64> },
    Chart { chart: Chart, drawing: Drawing },
}

pub(crate) fn run(args: &MapArgs) -> Result<Outcome, CommandError> {
    let context = MetaContextName::new(args.context.clone()).map_err(|_| {
        CommandError::new(format!(
            "'{}' is not the name of a metadata context; give one such as base:allocation (see \
             'nbd-cli list-meta {}')",
            args.context, args.uri
        ))
    })?;
    args.server.check([&args.uri])?;
    let mut output = Output::new();
    tasks::block_on(&runtime()?, map(args, &context, &mut output))?;
    output.finish()?;
    Ok(Outcome::Success)
}

async fn map(
    args: &MapArgs,
    context: &MetaContextName,
    output: &mut Output,
) -> Result<(), CommandError> {
    let connector = args.server.connector(&args.uri).meta_contexts([context.clone()]);
    let client = connect(&connector, &args.uri).await?;
    if !client.meta_contexts().contains(context) {
        return Err(CommandError::new(format!(
            "{} does not offer the metadata context '{context}'; list those that it offers with \
             'nbd-cli list-meta {}'",
            args.uri, args.uri
        )));
    }
    let size = client.info().size;
    let mut report = MapPrinter::new(args, size);
    report.begin(output)?;
    let mut extents = client.extents(context, 0..size);
    while let Some(extent) = extents.next().await {
        let extent = extent.map_err(|error| failed(&args.uri, "map", &error))?;
        report.add(context, extent.offset, extent.length, extent.flags, output)?;
    }
    report.end(args, context, size, output)?;
    drop(extents);
    // The result is complete, so the way in which the connection ends does not matter.
    let _ = client.disconnect().await;
    Ok(())
}

impl MapPrinter {
    fn new(args: &MapArgs, size: u64) -> Self {
        let format = ReportFormat::from_json_flag(args.json);
        if let Some(drawing) = Drawing::requested(args.chart, args.color, args.svg.as_deref()) {
            Self::Chart { chart: drawing.begin(size), drawing }
        } else if args.totals {
            Self::Totals { format, bytes: BTreeMap::new() }
        } else {
            match format {
                ReportFormat::Text => Self::Text,
                ReportFormat::Json => Self::Json { first: true },
            }
        }
    }

    fn begin(&self, output: &mut Output) -> Result<(), CommandError> {
        match self {
            Self::Json { .. } => output.text("["),
            _ => Ok(()),
        }
    }

    fn add(
        &mut self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
        flags: u64,
        output: &mut Output,
    ) -> Result<(), CommandError> {
        match self {
            Self::Text => {
                let what = description(context, flags);
                let line = format!("{offset:>10}  {length:>10}  {flags:>3}  ");
                output.line((line + what.as_deref().unwrap_or_default()).trim_end())
            }
            Self::Json { first } => {
                let description = description(context, flags);
                let extent = JsonExtent { offset, length, kind: flags, description };
                let separator = if std::mem::take(first) { "\n" } else { ",\n" };
                output.text(separator)?;
                output.compact_json(&extent)
            }
            Self::Totals { bytes, .. } => {
                if bytes.len() >= MAX_TOTALS && !bytes.contains_key(&flags) {
                    return Err(CommandError::new(format!(
                        "the server reports more than {MAX_TOTALS} different values for \
                         '{context}'; leave out --totals"
                    )));
                }
                // The sum is at most the size of the disk.
                *bytes.entry(flags).or_default() += length;
                Ok(())
            }
            Self::Chart { chart, .. } => {
                chart.add(offset, length, Class::of(context, flags));
                Ok(())
            }
        }
    }

    fn end(
        self,
        args: &MapArgs,
        context: &MetaContextName,
        size: u64,
        output: &mut Output,
    ) -> Result<(), CommandError> {
        match self {
            Self::Text => Ok(()),
            Self::Json { .. } => output.line("\n]"),
            Self::Totals { format, bytes } => totals(context, size, &bytes, format, output),
            Self::Chart { chart, drawing } => {
                drawing.finish(&chart, &format!("{} ({context})", args.uri), output)
            }
        }
    }
}

fn totals(
    context: &MetaContextName,
    size: u64,
    bytes: &BTreeMap<u64, u64>,
    format: ReportFormat,
    output: &mut Output,
) -> Result<(), CommandError> {
    let mut separator = "[\n";
    for (&kind, &total) in bytes {
        let percent = total as f64 * 100.0 / size as f64;
        let description = description(context, kind);
        match format {
            ReportFormat::Text => {
                let what = description.unwrap_or_default();
                let line = format!("{total:>10} {percent:>5.1}% {kind:>3} {what}");
                output.line(line.trim_end())?;
            }
            ReportFormat::Json => {
                output.text(separator)?;
                output.compact_json(&JsonTotal { size: total, percent, kind, description })?;
                separator = ",\n";
            }
        }
    }
    match format {
        ReportFormat::Text => Ok(()),
        ReportFormat::Json if bytes.is_empty() => output.line("[]"),
        ReportFormat::Json => output.line("\n]"),
    }
}
