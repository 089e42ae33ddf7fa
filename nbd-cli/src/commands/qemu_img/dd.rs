//! `qemu-img dd`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use imgfmt::{CreateOptions, Format, Locking, VhdSize};
use nbd_jobs::convert::{ConvertOptions, Destination, convert};
use nbd_jobs::image_location::ImageLocation;

use super::arguments::Arguments;
use super::known::Opt;
use super::options::{SECTOR, size_argument};
use super::place::Place;
use super::progress::Percentage;
use super::refusal::{Refusal, complain};

/// The unit of `count` and `skip`, in bytes.
const BLOCK_DEFAULT: u64 = 512;
/// The largest, in bytes.
const BLOCK_MAX: u64 = (1 << 31) - 1;

/// The operands.
#[derive(Default)]
struct Operands {
    from: Option<OsString>,
    to: Option<OsString>,
    block: Option<u64>,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(words: &[OsString]) -> Result<Self, Refusal> {
        let mut operands = Self::default();
        for word in words {
            let at = word.as_bytes().iter().position(|byte| *byte == b'=');
            let (key, value) = word.as_bytes().split_at(at.unwrap_or(word.len()));
            let value = OsStr::from_bytes(value.strip_prefix(b"=").unwrap_or_default());
            let number = |what: &str| size_argument(what, &value.to_string_lossy());
            // As in QEMU, a number of blocks has no suffix.
            let is_number = value.as_bytes().last().is_some_and(u8::is_ascii_digit)
                || value.as_bytes().starts_with(b"0x");
            let blocks = |what: &str| match is_number {
                true => number(what),
                false => {
                    let value = value.display();
                    Err(Refusal::new(format!("Invalid {what} specified: '{value}'.")))
                }
            };
            match (key, at) {
                (b"if", Some(_)) => operands.from = Some(value.to_owned()),
                (b"of", Some(_)) => operands.to = Some(value.to_owned()),
                (b"bs", Some(_)) => operands.block = Some(number("bs")?),
                (b"count", Some(_)) => operands.count = Some(blocks("count")?),
                (b"skip", Some(_)) => operands.skip = blocks("skip")?,
                _ => {
                    let word = word.display();
                    return Err(Refusal::new(format!("unrecognized operand {word}")));
                }
            }
        }
        Ok(operands)
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let operands = Operands::parse(&arguments.operands)?;
    let (Some(from), Some(to)) = (&operands.from, &operands.to) else {
        return Err(Refusal::new("Must specify both input and output files"));
    };
    let block = operands.block.unwrap_or(BLOCK_DEFAULT);
    if !(1..=BLOCK_MAX).contains(&block) {
        let range = format!("between 1 and {BLOCK_MAX}");
        return Err(Refusal::new(format!("Invalid bs specified. Must be {range}.")));
    }
    let format = arguments.format(Opt::TargetFormat)?;
    let source = Place::new(arguments, from, Opt::Format, Opt::None)?;
    // As in QEMU, `count` counts what is skipped.
    let end = operands.count.and_then(|count| count.checked_mul(block)).unwrap_or(u64::MAX);
    let start = operands.skip.saturating_mul(block);
    // A server may end after the first connection, so its disk is opened twice only if it has to
    // be.
    if start > 0 && start > end.min(source.open()?.size()) {
        complain(&format!("{}: cannot skip to specified offset", from.display()));
    }
    let to = Place::parse(arguments, to, false)?.location;
    let format = format.unwrap_or(Format::Raw);
    refuse_target(&to, format, &[start, if end == u64::MAX { 0 } else { end }])?;
    let mut create = CreateOptions::new(format, 0);
    // As in QEMU, the geometry counts.
    create.foreign.vhd_size = VhdSize::Geometry;
    create.open.locking = Locking::Auto;
    let mut options = ConvertOptions::new(create);
    options.part = start.min(end)..end;
    options.destination = Destination::Replaced;
    options.read = source.options.clone();
    (options.remotes, options.reconnecting) = (source.remotes.clone(), source.remotes.clone());
    let progress = Percentage::begin(false)?;
    convert(&source.location, &to, &options, &progress.context())?;
    Ok(0)
}

/// Refuses a target that cannot be written, or of which bytes past the `bounds` would be.
fn refuse_target(to: &ImageLocation, format: Format, bounds: &[u64]) -> Result<(), Refusal> {
    match to {
        ImageLocation::Described { .. } => Err(Refusal::new(format!(
            "{to}: dd writes to the name of a file or of an export; use 'convert -n \
             --target-image-opts' to write where options say"
        ))),
        ImageLocation::Export { .. }
            if format == Format::Raw && !bounds.iter().all(|it| it.is_multiple_of(SECTOR)) =>
        {
            Err(Refusal::new(format!(
                "{to}: an export is written in sectors of {SECTOR} bytes; give bs, skip \
                 and count so that both ends are multiples of that"
            )))
        }
        _ => Ok(()),
    }
}
