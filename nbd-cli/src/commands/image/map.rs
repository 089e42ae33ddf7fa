//! `nbd-cli image map`.

mod entry;
mod export;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use imgfmt::{Content, Extent, ExtentKind, Format, GuestOffset, GuestRange, Image};
use nbd_jobs::chart::Chart;
use nbd_jobs::image_location::ImageLocation;

use self::entry::MapEntry;
use super::location;
use super::open::OpenArgs;
use crate::connect::ServerArgs;
use crate::drawing::Drawing;
use crate::error::{CommandError, Outcome};
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat};
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

    /// Draw the disk, one line per part of it: what this image has, and what comes from backing files.
    #[arg(long)]
    pub chart: bool,

    /// Write a picture of the disk (SVG) to a file, or to standard output (-). An existing file is
    /// replaced only if it is such a picture.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "chart"])]
    pub svg: Option<PathBuf>,

    /// When to colour the chart.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub color: ColorChoice,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    #[command(flatten)]
    pub open: OpenArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

/// Writes entries in order, and joins adjacent ones that are alike.
struct MapPrinter {
    format: ReportFormat,
    /// The chart, if one is drawn instead; begun with the first entry.
    drawing: Option<(Option<Chart>, Drawing)>,
    pending: Option<MapEntry>,
    separator: &'static str,
}

pub(crate) fn run(args: &MapArgs) -> Result<Outcome, CommandError> {
    let location = location::parse_one(&args.path, &args.server, &args.open.trust)?;
    let format = ReportFormat::from_json_flag(args.json);
    let mut output = Output::new();
    let drawing = Drawing::requested(args.chart, args.color, args.svg.as_deref());
    let drawing = drawing.map(|drawing| (None, drawing));
    let mut report = MapPrinter { format, drawing, pending: None, separator: "[" };
    let options = args.share.apply(args.open.options_with(&args.server));
    let (location, options) = location.settled(&options, &args.server.remotes())?;
    match location {
        // The server does not know the map of an image inside its export.
        ImageLocation::Export { uri, .. } if options.format != Some(Format::Qcow2) => {
            export::map(uri, &args.server, |size, entry| report.add(size, entry, &mut output))?;
        }
        _ => {
            let image = location.open(&options, &args.server.remotes()).map_err(advise_sharing)?;
            let (layers, size) = (image.layer_sizes(), image.size());
            for extent in image.extents(span(0, size)) {
                for extent in split_at_end_of_layer(extent?, &layers).into_iter().flatten() {
                    parts(&image, extent, &layers, |entry| report.add(size, entry, &mut output))?;
                }
            }
        }
    }
    report.end(args, &mut output)?;
    output.finish()?;
    Ok(Outcome::Success)
}

/// The range from `start` to `end`, which does not lie before.
fn span(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end)).unwrap_or_default()
}

/// Splits an extent at the end of its layer. Past it the layer has no data, but hides the layers
/// below.
fn split_at_end_of_layer(extent: Extent, layers: &[u64]) -> [Option<Extent>; 2] {
    let (start, end) = (extent.range.offset().bytes(), extent.range.end().bytes());
    match (extent.depth as usize).checked_sub(1).and_then(|index| layers.get(index)) {
        Some(&size) if start < size && size < end => {
            [span(start, size), span(size, end)].map(|range| {
                let mut part = extent;
                part.range = range;
                Some(part)
            })
        }
        _ => [Some(extent), None],
    }
}

/// Returns the number, from 0, of the last layer that was examined for an extent that none has.
fn last_layer_asked(extent: Extent, layers: &[u64]) -> Option<u32> {
    let last = u32::try_from(layers.len()).unwrap_or(u32::MAX).saturating_sub(1);
    let Some(index) = extent.depth.checked_sub(1) else { return Some(last) };
    let size = layers.get(index as usize)?;
    // The layer ends before the extent, which therefore belongs to the one above.
    (extent.range.offset().bytes() >= *size).then(|| index.saturating_sub(1))
}

/// Splits an extent by where its bytes are.
fn parts(
    image: &Image,
    extent: Extent,
    layers: &[u64],
    mut each: impl FnMut(MapEntry) -> Result<(), CommandError>,
) -> Result<(), CommandError> {
    let absent = last_layer_asked(extent, layers);
    let part = |range: GuestRange, compressed, offset| MapEntry {
        start: range.offset().bytes(),
        length: range.length(),
        depth: absent.unwrap_or(extent.depth.saturating_sub(1)),
        present: absent.is_none(),
        zero: extent.kind != ExtentKind::Data,
        data: extent.kind == ExtentKind::Data,
        compressed,
        offset,
    };
    if absent.is_some() {
        return each(part(extent.range, false, None));
    }
    for mapping in image.map_read(extent.range)?.mappings() {
        each(match mapping.content {
            Content::File(span) => part(mapping.range, false, Some(span.offset.bytes())),
            Content::Encoded(_) => part(mapping.range, true, None),
            _ => part(mapping.range, false, None),
        })?;
    }
    Ok(())
}

impl MapPrinter {
    /// `size` is that of the disk.
    fn add(&mut self, size: u64, entry: MapEntry, output: &mut Output) -> Result<(), CommandError> {
        if let Some((chart, drawing)) = &mut self.drawing {
            let chart = chart.get_or_insert_with(|| drawing.begin(size));
            chart.add(entry.start, entry.length, entry.class());
            return Ok(());
        }
        if self.pending.as_mut().is_some_and(|pending| pending.join(&entry)) {
            return Ok(());
        }
        match self.pending.replace(entry) {
            Some(complete) => self.write(&complete, output),
            None => Ok(()),
        }
    }

    fn write(&mut self, entry: &MapEntry, output: &mut Output) -> Result<(), CommandError> {
        match self.format {
            ReportFormat::Text => output.line(&entry.text()),
            ReportFormat::Json => {
                output.text(std::mem::replace(&mut self.separator, ",\n"))?;
                let text = serde_json::to_string(entry);
                output.text(&text.map_err(|error| CommandError::output(&error.into()))?)
            }
        }
    }

    fn end(mut self, args: &MapArgs, output: &mut Output) -> Result<(), CommandError> {
        if let Some((chart, drawing)) = self.drawing {
            let chart = chart.unwrap_or_else(|| drawing.begin(0));
            return drawing.finish(&chart, &args.path.to_string_lossy(), output);
        }
        if let Some(last) = self.pending.take() {
            self.write(&last, output)?;
        }
        match (self.format, self.separator) {
            (ReportFormat::Text, _) => Ok(()),
            (ReportFormat::Json, "[") => output.line("[]"),
            (ReportFormat::Json, _) => output.line("]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::MapEntry;

    #[test]
    fn parts_are_joined_only_if_the_file_goes_on_too() {
        let part = |start, offset| MapEntry {
            start,
            length: 10,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset,
        };
        let mut first = part(0, Some(100));
        assert!(!first.join(&part(10, Some(120))));
        assert!(!first.join(&part(10, None)));
        assert!(first.join(&part(10, Some(110))));
        assert_eq!(first.length, 20);
    }
}
