//! `qemu-img bitmap`.

use imgfmt::{BackingFile, BitmapChange, Image, Recording};
use nbd_jobs::bitmaps::{change_bitmaps, granularity_default, merges_from};

use super::arguments::Arguments;
use super::known::Opt;
use super::options::size_argument;
use super::place::Place;
use super::progress::Percentage;
use super::refusal::Refusal;

const ACTIONS: [Opt; 6] =
    [Opt::Add, Opt::Remove, Opt::Clear, Opt::Enable, Opt::Disable, Opt::Merge];

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let [file, name] = &arguments.operands[..] else {
        return Err(Refusal::usage("Expecting filename and bitmap name"));
    };
    let name = name.to_string_lossy();
    if arguments.count(&ACTIONS) == 0 {
        return Err(Refusal::usage(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    if arguments.has(Opt::Granularity) && !arguments.has(Opt::Add) {
        return Err(Refusal::new("granularity only supported with --add"));
    }
    if arguments.has(Opt::SourceFile) && !arguments.has(Opt::Merge) {
        return Err(Refusal::new("Merge bitmap source file only supported with --merge"));
    }
    if arguments.has(Opt::SourceFormat) && !arguments.has(Opt::SourceFile) {
        return Err(Refusal::new("-F only supported with -b"));
    }
    let granularity = arguments.text(Opt::Granularity)?;
    let granularity = granularity.map(|text| size_argument("granularity", &text)).transpose()?;
    let mut place = Place::new(arguments, file, Opt::Format, Opt::None)?;
    // Nothing is read of it, and a virtual machine may have locked it.
    place.options.backing = BackingFile::Ignored;
    let image = place.open_to_change()?;
    let source = source(arguments)?;
    let observer = Percentage::begin(false)?.context().observer;
    let changes = |image: &Image| changes(arguments, image, source.as_ref(), &name, granularity);
    change_bitmaps(&image, &*observer, changes)
        .map_err(|error: Refusal| error.about(&format!("Operation on bitmap {name} failed")))?;
    image.close()?;
    Ok(0)
}

/// The image whose bitmaps are merged, if it is another one.
fn source(arguments: &Arguments) -> Result<Option<Image>, Refusal> {
    let Some(file) = arguments.value(Opt::SourceFile) else { return Ok(None) };
    let mut place = Place::parse(arguments, file, false)?;
    place.options.format = arguments.format(Opt::SourceFormat)?;
    // The image that is changed may be below it.
    place.options.backing = BackingFile::Ignored;
    place.open().map(Some)
}

/// The changes in the order of the command line; all of them or none are made.
fn changes(
    arguments: &Arguments,
    image: &Image,
    source: Option<&Image>,
    bitmap: &str,
    granularity: Option<u64>,
) -> Result<Vec<BitmapChange>, Refusal> {
    let mut changes = Vec::new();
    let name = || bitmap.to_owned();
    for (action, value) in arguments.in_order(&ACTIONS) {
        let from = value.to_string_lossy().into_owned();
        changes.push(match action {
            Opt::Add => {
                let granularity = match granularity {
                    Some(bytes) => bytes,
                    None => granularity_default(image)?,
                };
                // Another action decides otherwise.
                let recording = Recording::Enabled;
                BitmapChange::Add { name: name(), granularity, recording }
            }
            Opt::Remove => BitmapChange::Remove { name: name() },
            Opt::Clear => BitmapChange::Clear { name: name() },
            Opt::Enable => BitmapChange::Enable { name: name() },
            Opt::Disable => BitmapChange::Disable { name: name() },
            _ => match source {
                None => BitmapChange::Merge { into: name(), from },
                Some(source) => {
                    changes.extend(merges_from::<Refusal>(source, &[from], bitmap)?);
                    continue;
                }
            },
        });
    }
    Ok(changes)
}
