//! `qemu-img dd`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use imgfmt::{CreateOptions, Durability, Format, GuestOffset, Image, Locking, VhdSize, is_zero};
use nbd_jobs::Durable;
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::target::{self, Existing, NewFile};

use super::arguments::Arguments;
use super::known::Opt;
use super::options::{SECTOR, size_argument};
use super::place::Place;
use super::progress::Percentage;
use super::refusal::{Refusal, complain};
use crate::signals;

/// The unit of `count` and `skip`, in bytes.
const BLOCK_DEFAULT: u64 = 512;
/// The largest, in bytes.
const BLOCK_MAX: u64 = (1 << 31) - 1;
/// Bytes that are copied at a time.
const STEP: u64 = 1 << 20;

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
    let image = source.open()?;
    // As in QEMU, `count` counts what is skipped.
    let end = operands.count.and_then(|count| count.checked_mul(block));
    let end = end.unwrap_or(u64::MAX).min(image.size());
    let start = operands.skip.saturating_mul(block);
    if start > end {
        complain(&format!("{}: cannot skip to specified offset", from.display()));
    }
    let size = end.saturating_sub(start);
    let ImageLocation::File(path) = Place::parse(to, false)?.location else {
        return Err(Refusal::new(format!("{}: only files can be written", to.display())));
    };
    if target::look(&path)? == Existing::BlockDevice {
        return Err(Refusal::new(format!(
            "{}: 'dd' to a device is not supported; use 'convert'",
            path.display()
        )));
    }
    let mut create = CreateOptions::new(format.unwrap_or(Format::Raw), 0);
    create.size = Some(size.next_multiple_of(SECTOR));
    // As in QEMU, the geometry counts.
    create.foreign.vhd_size = VhdSize::Geometry;
    create.foreign.final_name = path.file_name().map(Into::into);
    write(&path, &create, |new| copy(&image, new, start, size))?;
    Ok(0)
}

/// Makes the image, in the place of an existing one if there is one.
fn write(
    path: &Path,
    create: &CreateOptions,
    fill: impl FnOnce(&Image) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let observer = Percentage::begin(false)?.context().observer;
    let make = |path: &Path| Image::create(path, create).map_err(Refusal::from);
    let (new, image) = NewFile::begin_or_replace(path, Locking::Auto, &observer, make)?;
    fill(&image)?;
    image.close()?;
    Ok(new.complete(Durable::Later)?)
}

/// Copies `size` bytes from `start` on to the start of a new image, which is zero.
fn copy(from: &Image, to: &Image, start: u64, size: u64) -> Result<(), Refusal> {
    let mut buffer = vec![0; size.min(STEP) as usize];
    let mut done = 0;
    while done < size {
        signals::stop_if_interrupted()?;
        let data = &mut buffer[..(size - done).min(STEP) as usize];
        from.read_at(GuestOffset::new(start + done), data)?;
        if !is_zero(data) {
            to.write_at(GuestOffset::new(done), data, Durability::Cached)?;
        }
        done += data.len() as u64;
    }
    Ok(())
}
