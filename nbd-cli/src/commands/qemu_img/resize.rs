//! `qemu-img resize`.

use std::ffi::OsString;

use imgfmt::Shrink;
use nbd_jobs::text::printable;

use super::arguments::Arguments;
use super::known::Opt;
use super::options::size_argument;
use super::place::Place;
use super::refusal::Refusal;
use super::text;

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
    match arguments.text(Opt::Preallocation)?.as_deref() {
        None | Some("off") => {}
        Some(mode @ ("metadata" | "falloc" | "full")) => {
            return Err(Refusal::new(format!(
                "--preallocation={mode} is not supported: added space is allocated when it is written"
            )));
        }
        Some(other) => {
            return Err(Refusal::new(format!("Invalid preallocation mode '{}'", printable(other))));
        }
    }
    let place = Place::new(arguments, file, Opt::Format, Opt::None)?;
    let mut image = place.open_to_change()?;
    let size = new_size(&size.to_string_lossy(), image.size())?;
    let shrink = match arguments.has(Opt::Shrink) {
        true => Shrink::Allow,
        false if size < image.size() => {
            return Err(Refusal::new(format!(
                "Use the --shrink option to perform a shrink operation: everything beyond {size} \
                 would be lost"
            )));
        }
        false => Shrink::Refuse,
    };
    image.resize(size, shrink)?;
    image.close()?;
    if !arguments.has(Opt::Quiet) {
        text::print("Image resized.\n")?;
    }
    Ok(0)
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
