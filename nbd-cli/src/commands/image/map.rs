//! `nbd-cli image map`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use imgfmt::Format;
use nbd_jobs::chart::{Chart, Class};
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::image_map::{MapEntry, map_export, map_image};
use nbd_jobs::tasks;

use super::read::ReadArgs;
use crate::async_runtime::runtime;
use crate::drawing::Drawing;
use crate::error::{CommandError, Outcome};
use crate::locking::advise_sharing;
use crate::output::{Output, ReportFormat};
use crate::signals;
use crate::terminal::ColorChoice;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image map disk.qcow2
  nbd-cli image map --json overlay.qcow2
  nbd-cli image map --chart overlay.qcow2
  nbd-cli image map --svg overlay.svg overlay.qcow2
  nbd-cli image map nbd://localhost/disk

Columns of the text: offset and length on the disk in bytes, the layer (0 is the image itself, 1 its
backing file and so on, - is none), the content, and the offset in that layer's file. In JSON a part
that no layer has is not present, and its depth is that of the last layer examined.

The map of an export comes from its server (base:allocation, and qemu:allocation-depth for the
layers if the server has it); the last column is then the offset in the export.";

/// Arguments of `nbd-cli image map`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct MapArgs {
    /// The image: a file, or an export as an NBD URI.
    pub path: OsString,

    /// Print JSON.
    #[arg(long, conflicts_with = "chart")]
    pub json: bool,

    /// Draw the disk, one line per part: the content of this image, and that of its backing files.
    #[arg(long)]
    pub chart: bool,

    /// Write a picture of the disk (SVG) to a file, or to standard output (-). An existing file is
    /// replaced only if it is a picture of this command.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "chart"])]
    pub svg: Option<PathBuf>,

    /// Whether to colour the chart.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub color: ColorChoice,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub read: ReadArgs,
}

/// Writes entries in order.
struct MapPrinter {
    format: ReportFormat,
    /// The chart, if one is drawn instead; begun with the first entry.
    drawing: Option<(Option<Chart>, Drawing)>,
    separator: &'static str,
}

pub(crate) fn run(args: &MapArgs) -> Result<Outcome, CommandError> {
    let location = args.read.location(&args.path)?;
    let format = ReportFormat::from_json_flag(args.json);
    let mut output = Output::new();
    let drawing = Drawing::requested(args.chart, args.color, args.svg.as_deref());
    let drawing = drawing.map(|drawing| (None, drawing));
    let mut report = MapPrinter { format, drawing, separator: "[" };
    let options = args.read.options();
    let (location, options) = location.settled(&options, &args.read.remotes())?;
    match location {
        // The server cannot map an image inside its export.
        ImageLocation::Export { uri, .. }
            if matches!(options.format, None | Some(Format::Raw)) && options.part.is_whole() =>
        {
            let (connector, cancellation) =
                (args.read.server.connector(uri), signals::cancellation());
            let add = |size, entry| report.add(size, &entry, &mut output);
            tasks::block_on(&runtime()?, map_export(connector, &cancellation, add))?;
        }
        _ => {
            let image = location.open(&options, &args.read.remotes()).map_err(advise_sharing)?;
            map_image(&image, |entry| report.add(image.size(), &entry, &mut output))?;
        }
    }
    report.end(args, &mut output)?;
    output.finish()?;
    Ok(Outcome::Success)
}

/// Returns the class of a part for the drawing.
fn class(entry: &MapEntry) -> Class {
    match (entry.present, entry.data && !entry.zero, entry.depth) {
        (true, true, 0) => Class::Local,
        (true, true, _) => Class::Backing,
        (true, false, _) => Class::Zero,
        (false, ..) => Class::Absent,
    }
}

fn text(entry: &MapEntry) -> String {
    let depth = if entry.present { entry.depth.to_string() } else { "-".into() };
    let what = match (entry.compressed, entry.data && !entry.zero, entry.present && entry.zero) {
        (true, ..) => "compressed",
        (_, true, _) => "data",
        (.., true) => "zero",
        _ => "hole",
    };
    let offset = entry.offset.map(|offset| format!("{offset:>12}")).unwrap_or_default();
    let line =
        format!("{:>12}  {:>12}  {depth:>3}  {what:<10}  {offset}", entry.start, entry.length);
    line.trim_end().to_owned()
}

impl MapPrinter {
    /// `size` is that of the disk.
    fn add(
        &mut self,
        size: u64,
        entry: &MapEntry,
        output: &mut Output,
    ) -> Result<(), CommandError> {
        if let Some((chart, drawing)) = &mut self.drawing {
            let chart = chart.get_or_insert_with(|| drawing.begin(size));
            chart.add(entry.start, entry.length, class(entry));
            return Ok(());
        }
        match self.format {
            ReportFormat::Text => output.line(&text(entry)),
            ReportFormat::Json => {
                output.text(std::mem::replace(&mut self.separator, ",\n"))?;
                output.compact_json(entry)
            }
        }
    }

    fn end(self, args: &MapArgs, output: &mut Output) -> Result<(), CommandError> {
        if let Some((chart, drawing)) = self.drawing {
            let chart = chart.unwrap_or_else(|| drawing.begin(0));
            return drawing.finish(&chart, &args.path.to_string_lossy(), output);
        }
        match (self.format, self.separator) {
            (ReportFormat::Text, _) => Ok(()),
            (ReportFormat::Json, "[") => output.line("[]"),
            (ReportFormat::Json, _) => output.line("]"),
        }
    }
}
