//! `qemu-img measure`.

use imgfmt::jobs::{JobContext, MeasuredDisk, measure};
use imgfmt::{Format, Preallocation};
use serde_json::json;

use super::arguments::Arguments;
use super::known::Opt;
use super::options::{NewImage, help, size_argument};
use super::place::Place;
use super::refusal::Refusal;
use super::snapshot;
use super::text::{self, json};
use crate::output::{Output, ReportFormat};

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let output_format = arguments.output()?;
    let format = arguments.format(Opt::TargetFormat)?;
    let format = format.unwrap_or(Format::Raw);
    let lists = arguments.lists()?;
    if let Some(text) = help(format, &lists, arguments.operands.first()) {
        return text::print(&text);
    }
    let size = arguments.text(Opt::Size)?.map(|text| size_argument("image size", &text));
    let size = size.transpose()?;
    if !matches!(format, Format::Raw | Format::Qcow2 | Format::Luks) {
        return Err(Refusal::new(format!(
            "Block driver '{format}' does not support size measurement"
        )));
    }
    let new = NewImage::new(format, &lists, &arguments.secrets)?;
    new.refuse_backing()?;
    let create = new.create;
    let image = match (&arguments.operands[..], size) {
        ([], Some(_)) if arguments.count(&[Opt::Snapshot, Opt::Format, Opt::ImageOpts]) > 0 => {
            return Err(Refusal::new("--image-opts, -f, and -l require a filename argument."));
        }
        ([], Some(_)) => None,
        ([operand], None) => {
            let mut place = Place::new(arguments, operand, Opt::Format, Opt::None)?;
            place.options.snapshot = snapshot::to_read(arguments, &place)?;
            Some(place.open()?)
        }
        _ => {
            return Err(Refusal::new("Either --size N or one filename must be specified."));
        }
    };
    let disk = match &image {
        Some(image) => MeasuredDisk::Image(image),
        None => MeasuredDisk::Empty(size.unwrap_or(0)),
    };
    let mut measured = measure(disk, &create, &JobContext::default())?;
    if matches!(create.preallocation, Preallocation::Falloc | Preallocation::Full) {
        measured.required = measured.fully_allocated;
    }
    let mut output = Output::new();
    match output_format {
        ReportFormat::Json => {
            let mut report = json!({
                "required": measured.required,
                "fully-allocated": measured.fully_allocated,
            });
            if let Some(bytes) = measured.bitmaps {
                report["bitmaps"] = bytes.into();
            }
            json(&report, &mut output)?;
        }
        ReportFormat::Text => {
            output.line(&format!("required size: {}", measured.required))?;
            output.line(&format!("fully allocated size: {}", measured.fully_allocated))?;
            if let Some(bytes) = measured.bitmaps {
                output.line(&format!("bitmaps size: {bytes}"))?;
            }
        }
    }
    output.finish()?;
    Ok(0)
}
