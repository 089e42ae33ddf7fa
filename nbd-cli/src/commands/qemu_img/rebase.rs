//! `qemu-img rebase`.

use imgfmt::jobs::Clusters;
use imgfmt::{CacheMode, Format, Image};
use nbd_jobs::overlay::rebase_overlay;

use super::arguments::Arguments;
use super::known::Opt;
use super::place::{Place, parse_cache};
use super::progress::Percentage;
use super::refusal::Refusal;

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let is_unsafe = arguments.has(Opt::Unsafe);
    let backing = arguments.value(Opt::Backing);
    if backing.is_none() && !is_unsafe {
        return Err(Refusal::usage("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    let clusters = match arguments.has(Opt::Compress) {
        true => Clusters::Compressed,
        false => Clusters::Plain,
    };
    let mut place =
        Place::new(arguments, arguments.only_operand()?, Opt::Format, Opt::Cache)?.not_shared();
    // For the new backing file only: the overlay is changed.
    let locking = std::mem::take(&mut place.options.locking);
    let (path, options) = place.file()?;
    let format = arguments.format(Opt::BackingFormat)?;
    let new = match (backing.filter(|name| !name.is_empty()), format) {
        (None, _) => None,
        (Some(name), Some(format)) => Some((name, format)),
        (Some(name), None) => {
            return Err(Refusal::new(format!(
                "Could not change the backing file to '{}': backing format must be specified (-F)",
                name.display()
            )));
        }
    };
    let mut for_backing = place.options.clone();
    for_backing.locking = locking;
    (for_backing.format, for_backing.cache) = (None, CacheMode::default());
    if let Some(mode) = arguments.text(Opt::SourceCache)? {
        for_backing.cache = parse_cache(&mode)?;
    }
    if place.inspect()?.format == Format::Raw {
        return Err(Refusal::new("a raw image cannot have a backing file"));
    }
    if let Some(new) = new {
        // Before anything is copied.
        Image::check_new_backing(path, &options, new)?;
    }
    let progress = Percentage::begin(arguments.wants_progress())?;
    let rebased = if is_unsafe {
        Image::change_backing_file(path, &options, new).map_err(Refusal::from)
    } else {
        let context = progress.context();
        rebase_overlay(path, &options, new, &for_backing, clusters, &place.remotes, &context)
            .map_err(Refusal::from)
    };
    progress.end_with(&rebased);
    rebased.map(|()| 0)
}
