//! `qemu-img resize`.

use std::ffi::OsString;

use imgfmt::{
    Durability, Format, GuestOffset, GuestRange, Image, Preallocation, Shrink, Speed, ZeroMode,
};
use nbd_jobs::text::printable;

use super::arguments::Arguments;
use super::known::Opt;
use super::options::size_argument;
use super::place::Place;
use super::refusal::Refusal;
use super::text;
use crate::signals;

/// A negative size, which stands last, is not an option.
pub(super) fn with_size_as_operand(mut words: Vec<OsString>) -> Vec<OsString> {
    let is_size = words.last().and_then(|word| word.to_str()).is_some_and(|word| {
        word.strip_prefix('-').is_some_and(|rest| rest.starts_with(|it: char| it.is_ascii_digit()))
    });
    if is_size && !words.iter().any(|word| word == "--") {
        words.insert(words.len() - 1, "--".into());
    }
    words
}

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let [file, size] = &arguments.operands[..] else {
        return Err(Refusal::usage("Expecting image file name and size"));
    };
    let added = match arguments.text(Opt::Preallocation)?.as_deref() {
        None | Some("off") => Preallocation::Off,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some("metadata") => {
            return Err(Refusal::new(
                "--preallocation=metadata is not supported; give falloc to set space aside",
            ));
        }
        Some(other) => {
            return Err(Refusal::new(format!("Invalid preallocation mode '{}'", printable(other))));
        }
    };
    let place = Place::new(arguments, file, Opt::Format, Opt::None)?;
    let mut image = place.open_to_change()?;
    let present = image.size();
    let size = new_size(&size.to_string_lossy(), present)?;
    if size <= present && added != Preallocation::Off {
        return Err(Refusal::new("Preallocation can only be used for growing images"));
    }
    let shrink = match arguments.has(Opt::Shrink) {
        true => Shrink::Allow,
        false if size < present => {
            return Err(Refusal::new(format!(
                "Use the --shrink option to perform a shrink operation: everything beyond {size} \
                 would be lost"
            )));
        }
        false => Shrink::Refuse,
    };
    image.resize(size, shrink)?;
    if let Err(refusal) = set_aside(&image, present, added) {
        // The error that led here is reported, not these. On a full disk the smaller disk needs
        // space too, and finds it where the added part was.
        let added = GuestRange::between(GuestOffset::new(present), GuestOffset::new(size));
        let _ = image.discard(added.unwrap_or_default(), Durability::Cached);
        let _ = image.flush();
        return Err(match image.resize(present, Shrink::Allow).and_then(|()| image.close()) {
            Ok(()) => refusal,
            Err(_) => refusal.with(&format!(
                "; the disk keeps its new size of {size} bytes, without all of the space for it"
            )),
        });
    }
    image.close()?;
    if !arguments.has(Opt::Quiet) {
        text::print("Image resized.\n")?;
    }
    Ok(0)
}

/// Allocates the part of the disk from `start` on, which is zero.
fn set_aside(image: &Image, start: u64, mode: Preallocation) -> Result<(), Refusal> {
    if mode == Preallocation::Off {
        return Ok(());
    }
    let step = 1 << 20;
    let zeroes = vec![0; step as usize];
    let mut position = start;
    while position < image.size() {
        signals::stop_if_interrupted()?;
        let part = GuestOffset::new(position);
        let length = step.min(image.size() - position);
        match (mode, GuestRange::new(part, length)) {
            // Only in a raw file does what is set aside read as zero.
            (Preallocation::Falloc, Some(range)) if image.format() == Format::Raw => {
                let mode = ZeroMode::KeepAllocated;
                image.write_zeroes(range, mode, Speed::Any, Durability::Cached)?;
            }
            _ => image.write_at(part, &zeroes[..length as usize], Durability::Cached)?,
        }
        position += length;
    }
    Ok(())
}

fn new_size(text: &str, present: u64) -> Result<u64, Refusal> {
    let size = |text: &str| size_argument("image size", text);
    let size = match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => present.checked_add(size(more)?),
        (_, Some(less)) => present.checked_sub(size(less)?),
        (None, None) => Some(size(text)?),
    };
    let possible = size.filter(|size| *size > 0 && i64::try_from(*size).is_ok());
    possible.ok_or_else(|| Refusal::new("New image size must be positive"))
}
