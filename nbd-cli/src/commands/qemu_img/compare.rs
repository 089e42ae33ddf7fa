//! `qemu-img compare`.

use std::ffi::OsStr;

use imgfmt::Image;
use imgfmt::jobs::{CompareOptions, JobError, JobErrorKind, compare};

use super::arguments::Arguments;
use super::known::Opt;
use super::options::SECTOR;
use super::place::Place;
use super::progress::Percentage;
use super::refusal::Refusal;
use crate::output::{Output, unless_closed};

/// The exit code if the disks are different, those of metadata and of data that cannot be read, and
/// that of any other error.
const DIFFERENT: u8 = 1;
const METADATA: u8 = 3;
const DATA: u8 = 4;
const ERROR: u8 = 2;

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let [first, second] = &arguments.operands[..] else {
        return Err(Refusal::usage("Expecting two image file names"));
    };
    compare_both(arguments, first, second).map_err(|error| match error.code {
        code @ (METADATA | DATA) => error.with_code(code),
        _ => error.with_code(ERROR),
    })
}

fn compare_both(arguments: &Arguments, first: &OsStr, second: &OsStr) -> Result<u8, Refusal> {
    let first = Place::new(arguments, first, Opt::Format, Opt::SourceCache)?;
    let second = Place::new(arguments, second, Opt::SecondFormat, Opt::SourceCache)?;
    let (first, second) = (first.open()?, second.open()?);
    let progress = Percentage::begin(arguments.wants_progress())?;
    let say = |text: &str| {
        if arguments.has(Opt::Quiet) {
            return Ok(());
        }
        let mut output = Output::new();
        let written = output.line(text).and_then(|()| output.finish());
        unless_closed(written)
    };
    let sizes_differ = first.size() != second.size();
    if sizes_differ && arguments.has(Opt::Strict) {
        say("Strict mode: Image size mismatch!")?;
        progress.end();
        return Ok(DIFFERENT);
    }
    let options = CompareOptions::default();
    let compared = compare(&first, &second, &options, &progress.context().for_images());
    if compared.is_err() {
        progress.end();
    }
    let compared = compared.map_err(|error| {
        let code = code_of(&error, [&first, &second]);
        Refusal::from(error).with_code(code)
    })?;
    let difference = compared.first_difference;
    // As in QEMU, a difference before the end of the shorter one is all that is reported.
    let common = first.size().min(second.size());
    if sizes_differ && difference.is_none_or(|offset| offset >= common) {
        say("Warning: Image size mismatch!")?;
    }
    let code = match difference {
        Some(offset) => {
            // As in QEMU.
            let sector = offset - offset % SECTOR;
            say(&format!("Content mismatch at offset {sector}!"))?;
            DIFFERENT
        }
        None => {
            progress.complete();
            say("Images are identical.")?;
            0
        }
    };
    progress.end();
    Ok(code)
}

/// Returns the exit code for an error of the comparison.
fn code_of(error: &JobError, images: [&Image; 2]) -> u8 {
    if error.kind() != JobErrorKind::Source || error.image_error().is_none() {
        return ERROR;
    }
    // Where all metadata can be read, data cannot.
    let is_whole = |image: &Image| image.extents(image.whole()).all(|extent| extent.is_ok());
    if images.into_iter().all(is_whole) { DATA } else { METADATA }
}
