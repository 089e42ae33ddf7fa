//! `qemu-img map`.

use std::path::PathBuf;

use imgfmt::{Format, Image};
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::image_map::{MapEntry, map_client, map_image};
use nbd_jobs::tasks;
use nbd_jobs::text::printable;
use nbd_proto::wire::MetaContextName;

use super::arguments::Arguments;
use super::known::Opt;
use super::options::{SECTOR, size_argument};
use super::place::{Place, shown_name};
use super::refusal::Refusal;
use crate::async_runtime::runtime;
use crate::error::CommandError;
use crate::output::{Output, ReportFormat};
use crate::signals;

/// The file of a layer of the chain.
struct LayerFile {
    name: String,
    is_raw: bool,
    /// Whether its data may lie in other files than that.
    is_scattered: bool,
    /// Whether its data cannot be read at an offset of its file.
    is_encrypted: bool,
    /// Where a raw disk begins in its file, in bytes.
    start: u64,
}

struct Printer {
    format: ReportFormat,
    layers: Vec<LayerFile>,
    /// Whether the page cache is bypassed.
    is_direct: bool,
    start: u64,
    end: u64,
    /// The files of the image.
    files: Vec<PathBuf>,
    is_first: bool,
    output: Output,
}

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let format = arguments.output()?;
    let size = |option, what: &str| {
        arguments.text(option)?.map(|text| size_argument(what, &text)).transpose()
    };
    let start = size(Opt::StartOffset, "start offset")?.unwrap_or(0);
    let end = size(Opt::MaxLength, "max length")?
        .and_then(|length| start.checked_add(length))
        .unwrap_or(u64::MAX);
    let mut place = Place::new(arguments, arguments.only_operand()?, Opt::Format, Opt::None)?;
    let context = take_context(&mut place)?;
    let (location, options) = place.settled()?;
    let layers = match options.format {
        // Nothing is read of it.
        Some(Format::Raw) if location.uri().is_some() => {
            let name = shown_name(location);
            let start = options.part.offset;
            vec![LayerFile { name, is_raw: true, is_scattered: false, is_encrypted: false, start }]
        }
        _ => layers(&place)?,
    };
    let is_raw = layers.first().is_some_and(|layer| layer.is_raw);
    let mut printer = Printer {
        format,
        layers,
        is_direct: options.cache.is_direct(),
        start,
        end,
        files: Vec::new(),
        is_first: true,
        output: Output::new(),
    };
    match location {
        // The server does not know the map of an image inside its export.
        ImageLocation::Export { uri, .. } if is_raw && options.part.is_whole() => {
            printer.begin()?;
            let (cancellation, runtime) = (signals::cancellation(), runtime()?);
            let add = |_, entry| printer.add(entry);
            // As in QEMU, nothing is told of the layers that the server has.
            let context = context.unwrap_or_else(MetaContextName::base_allocation);
            // Its format may have been looked for over this connection.
            let export = place.remotes.open(uri)?;
            let client = export.client().asynchronous();
            let map = map_client(client, uri, &cancellation, Some(&context), add);
            tasks::block_on(&runtime, map)?;
        }
        _ if context.is_some() => {
            return Err(Refusal::new("x-dirty-bitmap is an option of exports with a raw disk"));
        }
        _ => {
            let image = place.open()?;
            printer.begin()?;
            printer.image(&image)?;
        }
    }
    if format == ReportFormat::Json {
        if printer.is_first {
            printer.nothing()?;
        }
        printer.output.line("]")?;
    }
    printer.output.finish()?;
    Ok(0)
}

/// Removes the context of QEMU's option `x-dirty-bitmap` from the name of an export, and selects it
/// for the connection.
fn take_context(place: &mut Place) -> Result<Option<MetaContextName>, Refusal> {
    let Some(name) = place.location.take_dirty_bitmap() else { return Ok(None) };
    let context = MetaContextName::new(&*name)
        .map_err(|error| Refusal::new(format!("x-dirty-bitmap={}: {error}", printable(&name))))?;
    place.remotes = place.remotes.clone().select(context.clone());
    Ok(Some(context))
}

fn layers(place: &Place) -> Result<Vec<LayerFile>, Refusal> {
    let mut layers = Vec::new();
    for image in place.layers()? {
        let data = image.info.qcow2.as_ref().and_then(|qcow2| qcow2.data_file_name.as_deref());
        let name = match data {
            Some(name) => image.location.beside(name)?.name(),
            None => shown_name(&image.location),
        };
        let format = image.info.format;
        let is_scattered = !matches!(format, Format::Raw | Format::Qcow2);
        let is_encrypted = image.info.encryption.is_some();
        let is_raw = format == Format::Raw;
        let start = if is_raw { start_of(&image.location) } else { 0 };
        layers.push(LayerFile { name, is_raw, is_scattered, is_encrypted, start });
    }
    Ok(layers)
}

/// Where the part of its file begins that the name of an image selects, in bytes.
fn start_of(location: &ImageLocation) -> u64 {
    match location {
        ImageLocation::Described { part, .. } => part.offset,
        _ => 0,
    }
}

impl Printer {
    fn begin(&mut self) -> Result<(), CommandError> {
        match self.format {
            ReportFormat::Json => Ok(()),
            ReportFormat::Text => self.output.line(&row("Offset", "Length", "Mapped to", "File")),
        }
    }

    fn image(&mut self, image: &Image) -> Result<(), CommandError> {
        self.files = image.files().into_iter().map(|(path, _)| path).collect();
        // With one file only, no data can be in another one.
        let has_other_files = self.files.len() > 1;
        for layer in &mut self.layers {
            layer.is_scattered &= has_other_files;
        }
        let mut last: Option<MapEntry> = None;
        let mut add = |entry| last.replace(entry).map_or(Ok(()), |entry| self.add(entry));
        map_image(image, &mut add)?;
        last.map_or(Ok(()), |entry| self.last(entry))
    }

    fn add(&mut self, mut entry: MapEntry) -> Result<(), CommandError> {
        let layer = self.layers.get(entry.depth as usize);
        let is_raw = layer.is_some_and(|layer| layer.is_raw);
        let is_unknown =
            |layer: &LayerFile| layer.is_encrypted || layer.is_scattered && entry.file.is_none();
        if layer.is_some_and(is_unknown) {
            entry.offset = None;
        }
        match (is_raw && entry.present, entry.zero && entry.offset.is_some()) {
            // In a raw image a hole has a place too.
            (true, _) => {
                let start = layer.map_or(0, |layer| layer.start);
                entry.offset = entry.start.checked_add(start);
            }
            // The image has data there, and its file a hole.
            (false, true) => entry.data = !entry.is_kept,
            (false, false) => {}
        }
        let from = entry.start.max(self.start);
        let to = (entry.start + entry.length).min(self.end);
        if from >= to {
            return Ok(());
        }
        entry.offset = entry.offset.map(|offset| offset + (from - entry.start));
        (entry.start, entry.length) = (from, to - from);
        match self.format {
            ReportFormat::Json => self.json(&entry),
            ReportFormat::Text => self.text(&entry),
        }
    }

    /// Adds the last part: in QEMU's sight, a raw disk consists of whole sectors.
    fn last(&mut self, mut entry: MapEntry) -> Result<(), CommandError> {
        let end = entry.start + entry.length;
        let missing = end.next_multiple_of(SECTOR) - end;
        // Direct requests are about whole sectors too.
        let is_alike = entry.zero && !entry.data || self.is_direct;
        if is_alike {
            entry.length += missing;
        }
        self.add(entry)?;
        if missing == 0 || is_alike {
            return Ok(());
        }
        (entry.start, entry.length, entry.zero, entry.data) = (end, missing, true, false);
        self.add(entry)
    }

    /// Reports an empty part, as QEMU does if there is no other.
    fn nothing(&mut self) -> Result<(), CommandError> {
        let start = self.start;
        self.is_first = false;
        self.output.text(&format!(
            "[{{ \"start\": {start}, \"length\": 0, \"depth\": 0, \"present\": false, \
             \"zero\": false, \"data\": false, \"compressed\": false}}"
        ))
    }

    fn json(&mut self, entry: &MapEntry) -> Result<(), CommandError> {
        let before = if std::mem::take(&mut self.is_first) { "[" } else { ",\n" };
        let offset = entry.offset.map_or_else(String::new, |it| format!(", \"offset\": {it}"));
        self.output.text(&format!(
            "{before}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \
             \"zero\": {}, \"data\": {}, \"compressed\": {}{offset}}}",
            entry.start,
            entry.length,
            entry.depth,
            entry.present,
            entry.zero,
            entry.data,
            entry.compressed
        ))
    }

    fn text(&mut self, entry: &MapEntry) -> Result<(), CommandError> {
        if !entry.data || entry.zero {
            return Ok(());
        }
        let Some(offset) = entry.offset else {
            return Err(CommandError::new(
                "File contains external, encrypted or compressed clusters.",
            ));
        };
        let hexadecimal = |number: u64| match number {
            0 => "0".to_owned(),
            _ => format!("{number:#x}"),
        };
        let file = entry.file.and_then(|number| self.files.get(number as usize));
        let file = file.map(|file| file.to_string_lossy());
        let name = match (self.layers.get(entry.depth as usize), &file) {
            (Some(layer), Some(file)) if layer.is_scattered => {
                // As the image is named.
                let is_beside = !layer.name.starts_with("./");
                file.strip_prefix("./").filter(|_| is_beside).unwrap_or(file)
            }
            (Some(layer), _) => &*layer.name,
            (None, _) => "",
        };
        let [start, length, offset] = [entry.start, entry.length, offset].map(hexadecimal);
        self.output.line(&row(&start, &length, &offset, &printable(name)))
    }
}

fn row(start: &str, length: &str, offset: &str, file: &str) -> String {
    format!("{start:<16}{length:<16}{offset:<16}{file}")
}
