//! `qemu-img convert`.

use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};

use imgfmt::jobs::{Background, Clusters, RateLimit, Unreadable, Zeroes};
use imgfmt::{Access, CreateOptions, Format, Locking, OpenOptions, Preallocation, Subformat};
use nbd_jobs::convert::{ConvertOptions, CopiedBitmaps, Destination, convert};
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::qemu_name::{BackingInName, DriverSettings};
use nbd_jobs::{Durable, JobContext};

use super::arguments::Arguments;
use super::create::refuse_impossible;
use super::known::Opt;
use super::options::{NewImage, SECTOR, help, size_argument};
use super::place::{Place, parse_cache};
use super::progress::Percentage;
use super::refusal::Refusal;
use super::snapshot;
use super::text;

/// Most threads that `-m` may ask for.
const PARALLEL_MAX: usize = 16;
const NO_BACKING_FOR_SEVERAL: &str = "Having a backing file for the target makes no sense when \
                                      concatenating multiple input images";

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let format = arguments.format(Opt::TargetFormat)?;
    let mut format = format.unwrap_or(Format::Raw);
    let lists = arguments.lists()?;
    if let Some(text) = help(format, &lists, arguments.operands.get(1)) {
        return text::print(&text);
    }
    let [from, more @ .., to] = &arguments.operands[..] else {
        return Err(Refusal::usage("Must specify image file name"));
    };
    let source = |operand: &OsString| Place::new(arguments, operand, Opt::Format, Opt::SourceCache);
    let from = source(from)?;
    let more = more.iter().map(source).collect::<Result<Vec<_>, _>>()?;
    if !more.is_empty() {
        refuse_for_several(arguments)?;
    }
    let is_options = arguments.has(Opt::TargetImageOpts);
    let to = Place::parse(arguments, to, is_options)?.with_keys(arguments)?;
    let (to, said) = target_of(arguments, &to)?;
    format = said.format.unwrap_or(format);
    check_options(arguments, format)?;
    let mut options = options(arguments, &from, format, &lists)?;
    // The keys of the source are not those of the target.
    (options.write.passphrases, options.write.encryption) = (said.passphrases, said.encryption);
    options.write.part = said.part;
    for place in more {
        options.read.passphrases.extend(place.options.passphrases);
        options.more.push(place.location);
    }
    if !options.more.is_empty() && options.create.backing.is_some() {
        return Err(Refusal::new(NO_BACKING_FOR_SEVERAL));
    }
    if let (ImageLocation::File(path), false) = (to, arguments.has(Opt::NoCreate)) {
        refuse_impossible(path, &options.create)
            .map_err(|error| error.about(&path.to_string_lossy()))?;
    }
    let rate_limit = rate(arguments)?;
    let progress = Percentage::begin_for(arguments)?;
    let context = JobContext { rate_limit, ..progress.context() };
    let result = convert(&from.location, to, &options, &context);
    progress.end_with(&result);
    result?;
    Ok(0)
}

/// Refuses what several sources cannot have.
fn refuse_for_several(arguments: &Arguments) -> Result<(), Refusal> {
    if arguments.has(Opt::Bitmaps) {
        return Err(Refusal::new("Copying bitmaps only possible with single source"));
    }
    if arguments.has(Opt::Snapshot) {
        return Err(Refusal::new("No support for concatenating multiple snapshot"));
    }
    if arguments.has(Opt::Salvage) {
        return Err(Refusal::new("--salvage is supported for a single source only"));
    }
    if arguments.has(Opt::Backing) {
        return Err(Refusal::new(NO_BACKING_FOR_SEVERAL));
    }
    Ok(())
}

/// Returns the target, and what its name says: only its format and its encryption.
fn target_of<'a>(
    arguments: &Arguments,
    to: &'a Place,
) -> Result<(&'a ImageLocation, OpenOptions), Refusal> {
    if arguments.has(Opt::TargetImageOpts) && arguments.has(Opt::TargetFormat) {
        return Err(Refusal::new("--target-image-opts and -O are mutually exclusive"));
    }
    let is_more = |settings: &DriverSettings| {
        let mut known = DriverSettings::default();
        known.key_secret.clone_from(&settings.key_secret);
        known.encryption = settings.encryption;
        *settings != known
    };
    if let ImageLocation::Described { backing, settings, .. } = &to.location
        && (!matches!(backing, BackingInName::AsNamed) || is_more(settings))
    {
        return Err(Refusal::new(format!(
            "the name of {} says how it is used or what its backing file is, which is not supported \
             for a target; leave all but its driver, its file and its key out, and give the cache with -t",
            to.location
        )));
    }
    to.settled()
}

/// Refuses options that contradict each other or are not supported.
fn check_options(arguments: &Arguments, format: Format) -> Result<(), Refusal> {
    let has = |option| arguments.has(option);
    if has(Opt::TargetImageOpts) && !has(Opt::NoCreate) {
        return Err(Refusal::new("--target-image-opts requires use of -n flag"));
    }
    if has(Opt::TargetIsZero) && !has(Opt::NoCreate) {
        return Err(Refusal::new("--target-is-zero requires use of -n flag"));
    }
    if has(Opt::NoCreate) && has(Opt::Options) {
        return Err(Refusal::new("-o is for a new image: with -n, the target keeps its options"));
    }
    if has(Opt::SkipBroken) && !has(Opt::Bitmaps) {
        return Err(Refusal::new("Use of --skip-broken-bitmaps requires --bitmaps"));
    }
    if has(Opt::Bitmaps) && format != Format::Qcow2 {
        return Err(Refusal::new(
            "Format driver '".to_owned() + format.name() + "' does not support bitmaps",
        ));
    }
    if has(Opt::Compress) && !matches!(format, Format::Qcow2 | Format::Vmdk) {
        return Err(Refusal::new("Compression not supported for this file format"));
    }
    if has(Opt::Backing) && has(Opt::TargetIsZero) {
        return Err(Refusal::new(
            "Cannot use --target-is-zero when the destination image has a backing file",
        ));
    }
    if has(Opt::Salvage) && has(Opt::CopyRange) {
        return Err(Refusal::new("Cannot use copy offloading in salvaging mode"));
    }
    if has(Opt::Compress) && has(Opt::CopyRange) {
        return Err(Refusal::new("Cannot enable copy offloading when -c is used"));
    }
    Ok(())
}

fn options(
    arguments: &Arguments,
    from: &Place,
    format: Format,
    lists: &[String],
) -> Result<ConvertOptions, Refusal> {
    let mut new = NewImage::new(made_format(arguments, format), lists, &arguments.secrets)?;
    new.create.format = format;
    if !arguments.has(Opt::NoCreate) {
        new.set_backing(arguments.text(Opt::Backing)?, arguments.text(Opt::BackingFormat)?)?;
    }
    let mut create = new.create;
    let mut zeroes = Zeroes::Holes;
    if let Some(text) = arguments.text(Opt::SparseSize)? {
        let size = size_argument("buffer size for sparse output", &text)?;
        if !size.is_multiple_of(SECTOR) {
            return Err(Refusal::new(format!(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of \
                 {SECTOR}. Select 0 to disable sparse detection (fully allocates output)."
            )));
        }
        if size == 0 && arguments.has(Opt::NoCreate) {
            zeroes = Zeroes::Data;
        } else if size == 0 && create.preallocation == Preallocation::Off {
            // The blocks of other formats are in the file or not, and zero either way.
            let is_fixed = create.foreign.subformat == Subformat::Fixed;
            if matches!(format, Format::Raw | Format::Qcow2) || is_fixed {
                create.preallocation = complete(&create);
            }
        }
    }
    let mut options = ConvertOptions::new(create);
    options.create.open.locking = Locking::Auto;
    options.read = from.options.clone();
    options.read.snapshot = snapshot::to_read(arguments, from)?;
    options.write = from.options.clone();
    (options.write.format, options.write.access) = (Some(format), Access::ReadWrite);
    options.write.locking = Locking::Auto;
    (options.remotes, options.reconnecting) = (from.remotes.clone(), from.remotes.clone());
    options.destination = match arguments.has(Opt::NoCreate) {
        true => Destination::Existing,
        false => Destination::Replaced,
    };
    options.bitmaps = match (arguments.has(Opt::Bitmaps), arguments.has(Opt::SkipBroken)) {
        (false, _) => CopiedBitmaps::None,
        (true, false) => CopiedBitmaps::All,
        (true, true) => CopiedBitmaps::Reliable,
    };
    if arguments.has(Opt::Compress) {
        options.clusters = Clusters::Compressed;
    }
    options.background = match arguments.has(Opt::TargetIsZero) {
        _ if arguments.has(Opt::Backing) && format == Format::Qcow2 => Background::Compared,
        true if zeroes == Zeroes::Holes => Background::Zero,
        _ => Background::Unknown,
    };
    options.zeroes = zeroes;
    if arguments.has(Opt::Salvage) {
        options.unreadable = Unreadable::Zeroed;
    }
    options.threads = parallel(arguments)?;
    options.cache = arguments.text(Opt::Cache)?.as_deref().map(parse_cache).transpose()?;
    options.write.cache = options.cache.unwrap_or_default();
    if options.cache.is_some_and(imgfmt::CacheMode::syncs) {
        options.durable = Durable::Now;
    }
    Ok(options)
}

/// The format whose options are read.
fn made_format(arguments: &Arguments, format: Format) -> Format {
    // A volume that exists has its key.
    let is_volume = arguments.has(Opt::NoCreate) && format == Format::Luks;
    if is_volume { Format::Raw } else { format }
}

/// The preallocation of an image without holes.
fn complete(create: &CreateOptions) -> Preallocation {
    match create.encryption {
        // Space that was only set aside would decrypt to noise.
        Some(_) => Preallocation::Full,
        None => Preallocation::Falloc,
    }
}

fn parallel(arguments: &Arguments) -> Result<Option<NonZeroUsize>, Refusal> {
    let Some(text) = arguments.text(Opt::Parallel)? else { return Ok(None) };
    match text.parse::<NonZeroUsize>() {
        Ok(number) if number.get() <= PARALLEL_MAX => Ok(Some(number)),
        _ => Err(Refusal::new(format!(
            "Invalid number of coroutines. Allowed number of coroutines is between 1 and \
             {PARALLEL_MAX}"
        ))),
    }
}

/// The limit of `-r`.
///
/// # Errors
///
/// If it is not a size.
pub(super) fn rate(arguments: &Arguments) -> Result<Option<RateLimit>, Refusal> {
    let Some(text) = arguments.text(Opt::Rate)? else { return Ok(None) };
    let rate = size_argument("rate limit", &text)?;
    let rate = NonZeroU64::new(rate).ok_or_else(|| Refusal::new("the rate limit cannot be 0"))?;
    Ok(Some(RateLimit::new(rate)))
}
