//! `qemu-img compare`.

use std::ffi::OsStr;

use imgfmt::jobs::{CompareOptions, compare};

use super::arguments::Arguments;
use super::known::Opt;
use super::options::SECTOR;
use super::place::Place;
use super::progress::Percentage;
use super::refusal::Refusal;
use crate::output::{Output, unless_closed};

/// The exit code if the disks are different, and that of an error.
const DIFFERENT: u8 = 1;
const ERROR: u8 = 2;

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let [first, second] = &arguments.operands[..] else {
        return Err(Refusal::usage("Expecting two image file names"));
    };
    compare_both(arguments, first, second).map_err(|error| error.with_code(ERROR))
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
    if sizes_differ {
        say("Warning: Image size mismatch!")?;
    }
    let options = CompareOptions::default();
    let compared = compare(&first, &second, &options, &progress.context().for_images());
    if compared.is_err() {
        progress.end();
    }
    let code = match compared?.first_difference {
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
