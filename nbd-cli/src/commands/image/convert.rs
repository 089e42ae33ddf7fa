//! `nbd-cli image convert`.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::time::Duration;

use clap::Args;
use imgfmt::jobs::{Background, Clusters};
use imgfmt::{CreateOptions, Format, NewKey, Qcow2Version};
use nbd_jobs::convert::{ConvertOptions, CopiedBitmaps, Destination, convert, convert_to_output};
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::size::parse_duration;
use nbd_jobs::{Durable, JobContext};

use super::create::{Compat, Qcow2Args};
use super::format_options::FormatOptions;
use super::location;
use super::read::ReadArgs;
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::{NewImageFormat, name_of_another_format};
use crate::new_key::NewKeyArgs;
use crate::output::{refuse_terminal, warn};
use crate::progress::{ProgressArgs, RateArgs};
use crate::serving::CacheMode;
use crate::shown::Shown;
use crate::signals;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image convert --output-format qcow2 disk.img disk.qcow2
  nbd-cli image convert -O qcow2 --compress --compression-type zstd disk.img small.qcow2
  nbd-cli image convert -O qcow2 --encrypt --new-key-file - disk.img secret.qcow2
  nbd-cli image convert --snapshot monday disk.qcow2 monday.img
  nbd-cli image convert -O qcow2 --bitmaps disk.qcow2 copy.qcow2
  nbd-cli image convert disk.qcow2 nbd://localhost/disk
  nbd-cli image convert -O qcow2 nbd://localhost/disk disk.qcow2
  nbd-cli image convert --no-create -O raw disk.qcow2 /dev/vg/disk
  nbd-cli image convert -O vmdk -o subformat=streamOptimized disk.qcow2 - | ssh host 'cat > d.vmdk'

The new image contains the whole disk and needs no backing file. Zeroes occupy no space in it. An
existing file is never changed, unless --no-create allows overwriting the disk in it. A new image
grows as NAME.partial and is renamed when it is complete; if the copy fails or is interrupted, it is
removed (after kill -9 NAME.partial is left), and an existing disk remains incomplete. The previous
data of a block device, which needs no --no-create, is lost at once; the device is marked as
incomplete until everything is on stable storage, so that a part of a disk is never mistaken for the
whole.

An export of an NBD server can be the source or the destination; a destination has to be large
enough, and --no-create is implied.

Standard output (-) gets formats that are written from the start to the end: raw, VMDK with
subformat=streamOptimized, and VHD (vpc) with subformat=fixed. If the copy fails, what was written is
incomplete, and a VMDK or VHD lacks its end, so that it is not taken for a complete one.

With --bitmaps the dirty bitmaps of the source are copied, with their granularity and enabled state.
The new image does not record after which backup they started: an incremental backup of it needs
--trust-base. Bitmaps of backing files are never copied.

The result is complete in memory when the command ends; --flush waits until it is on the disk, as
does every --cache but unsafe. With --cache none and --source-cache none the copy does not displace
what other programs have in the page cache.";

/// Arguments of `nbd-cli image convert`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ConvertArgs {
    /// The image to copy: a file, or an export as an NBD URI.
    pub source: OsString,

    /// The new file, an export as an NBD URI, or - for standard output.
    pub destination: OsString,

    /// Format of the new image [default: raw].
    #[arg(short = 'O', long, value_name = "FORMAT")]
    pub output_format: Option<NewImageFormat>,

    /// Write into an existing disk, at least as large as the source; needs --output-format if it is
    /// a file.
    #[arg(short, long)]
    pub no_create: bool,

    /// The existing disk already reads as zero: do not write zeroes to it.
    #[arg(long, alias = "target-is-zero")]
    pub destination_is_zero: bool,

    /// Compress the clusters of a new qcow2 image.
    #[arg(short, long)]
    pub compress: bool,

    /// Copy this internal snapshot, given by name or id, instead of the active state.
    #[arg(short = 'l', long, value_name = "NAME")]
    pub snapshot: Option<String>,

    /// Copy the dirty bitmaps of the source itself, not of its backing files, into a qcow2 image.
    #[arg(long, conflicts_with = "snapshot")]
    pub bitmaps: bool,

    /// Omit unreliable bitmaps; without this they are an error.
    #[arg(long, requires = "bitmaps")]
    pub skip_broken_bitmaps: bool,

    /// Number of threads [default: the number of cores; 8 with a server].
    #[arg(short, long, value_name = "N")]
    pub jobs: Option<NonZeroUsize>,

    /// Time limit for restoring a lost connection to the source, or to a raw disk as the
    /// destination: seconds, or 500ms, 2m.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub reconnect: Duration,

    /// Wait at the end until the result is on stable storage.
    #[arg(long)]
    pub flush: bool,

    /// The use of the page cache for the destination [default: unsafe for a new image, writeback
    /// for an existing disk or a device, for which unsafe means the same].
    #[arg(short = 't', long, value_enum, value_name = "MODE")]
    pub cache: Option<CacheMode>,

    /// The use of the page cache for the source and its backing files [default: writeback].
    #[arg(short = 'T', long, value_enum, value_name = "MODE")]
    pub source_cache: Option<CacheMode>,

    #[command(flatten)]
    pub rate: RateArgs,

    #[command(flatten)]
    pub progress: ProgressArgs,

    /// Encrypt the new image with LUKS (AES-256, XTS) and the passphrase in --new-key-file; always
    /// the case with --output-format luks. --key-file is for the source, and an existing image.
    #[arg(long, requires = "new_key_file", conflicts_with_all = ["no_create", "compress"])]
    pub encrypt: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub new_key: NewKeyArgs,

    /// Print the new image, like `nbd-cli image info --json`.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub format_options: FormatOptions,

    #[command(flatten)]
    pub qcow2: Qcow2Args,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub read: ReadArgs,
}

pub(crate) fn run(args: &ConvertArgs) -> Result<Outcome, CommandError> {
    if args.destination == "-" {
        return run_to_output(args);
    }
    let [from, destination] = location::parse_two(
        [&args.source, &args.destination],
        &args.read.server,
        &args.read.open.trust,
    )?;
    let format = args.output_format.map_or(Format::Raw, Format::from);
    if args.format_options.help(&CreateOptions::new(format, 0))? {
        return Ok(Outcome::Success);
    }
    let exists = args.no_create || matches!(destination, ImageLocation::Export { .. });
    check_options(args, &destination, format, exists)?;
    check_caches(args, &from, &destination)?;
    if let (ImageLocation::File(path), false) = (&destination, exists)
        && let Some(why) = name_of_another_format(path, format, "--output-format")
    {
        warn(&why);
    }
    let options = options(args, format, exists)?;
    let shown = Shown::new(args.progress.visibility());
    let context = JobContext { rate_limit: args.rate.limit(), ..shown.context() };
    let result = convert(&from, &destination, &options, &context);
    match &result {
        Ok(()) => shown.finish(),
        Err(_) => shown.clear(),
    }
    result?;
    if let (ImageLocation::File(path), true) = (&destination, args.json) {
        super::info::print_json(path, &args.read.open.trust.options().format(format))?;
    }
    Ok(Outcome::Success)
}

/// Writes the new image to standard output.
fn run_to_output(args: &ConvertArgs) -> Result<Outcome, CommandError> {
    let from = args.read.location(&args.source)?;
    let format = args.output_format.map_or(Format::Raw, Format::from);
    if args.format_options.help(&CreateOptions::new(format, 0))? {
        return Ok(Outcome::Success);
    }
    let for_files = [
        (args.no_create, "--no-create"),
        (args.destination_is_zero, "--destination-is-zero"),
        (args.bitmaps, "--bitmaps"),
        (args.compress, "--compress"),
        (args.encrypt, "--encrypt"),
        (args.new_key.new_key_file.is_some(), "--new-key-file"),
        (args.cache.is_some(), "--cache"),
        (args.flush, "--flush"),
        (args.json, "--json"),
    ];
    if let Some((_, option)) = for_files.into_iter().find(|(is_given, _)| *is_given) {
        return Err(CommandError::new(format!(
            "{option} does not apply to standard output; leave it out, or give a file as the destination"
        )));
    }
    refuse_terminal()?;
    let options = options(args, format, false)?;
    let shown = Shown::new(args.progress.visibility());
    let context = JobContext { rate_limit: args.rate.limit(), ..shown.context() };
    let result = convert_to_output(&from, &options, &context);
    match &result {
        Ok(()) => shown.finish(),
        Err(_) => shown.clear(),
    }
    result?;
    Ok(Outcome::Success)
}

fn options(
    args: &ConvertArgs,
    format: Format,
    exists: bool,
) -> Result<ConvertOptions, CommandError> {
    let mut create = CreateOptions::new(format, 0);
    create.give_up = || signals::caught().is_some();
    args.qcow2.apply(&mut create)?;
    args.format_options.apply(&mut create, &args.qcow2.given())?;
    if args.bitmaps && create.version == Qcow2Version::V2 {
        return Err(CommandError::new("--bitmaps needs version 3 of qcow2; omit compat=0.10"));
    }
    create.encryption = encryption(args, format, exists)?;
    let locks = args.read.open.trust.locks;
    create.open = create.open.locking(locks.locking());
    let mut options = ConvertOptions::new(create);
    let reconnecting = ServerArgs { reconnect: Some(args.reconnect), ..args.read.server.clone() };
    options.read = args.read.options_with(&reconnecting);
    options.read.snapshot.clone_from(&args.snapshot);
    options.read.cache = args.source_cache.map_or(options.read.cache, Into::into);
    options.cache = args.cache.map(Into::into);
    options.write = locks.options().policy(args.read.open.trust.policy_with(&args.read.server));
    (options.remotes, options.reconnecting) = (args.read.remotes(), reconnecting.remotes());
    if exists {
        options.destination = Destination::Existing;
        options.write.passphrases.clone_from(&options.read.passphrases);
    }
    options.bitmaps = match (args.bitmaps, args.skip_broken_bitmaps) {
        (false, _) => CopiedBitmaps::None,
        (true, false) => CopiedBitmaps::All,
        (true, true) => CopiedBitmaps::Reliable,
    };
    if args.compress {
        options.clusters = Clusters::Compressed;
    }
    if args.destination_is_zero {
        options.background = Background::Zero;
    } else {
        options.background = Background::Unknown;
    }
    options.threads = args.jobs;
    if args.flush || args.cache.is_some_and(|cache| cache != CacheMode::Unsafe) {
        options.durable = Durable::Now;
    }
    Ok(options)
}

/// The key of an encrypted new image.
fn encryption(
    args: &ConvertArgs,
    format: Format,
    exists: bool,
) -> Result<Option<NewKey>, CommandError> {
    let is_wanted = !exists && (args.encrypt || format == Format::Luks);
    match (&args.new_key.new_key_file, is_wanted) {
        (Some(file), true) => args.new_key.iter_time.key(file).map(Some),
        (None, true) => Err(CommandError::new(
            "an encrypted image needs a passphrase; add --new-key-file FILE, or --new-key-file - to be \
             asked",
        )),
        (Some(_), false) => Err(CommandError::new(
            "--new-key-file is for a new encrypted image; add --encrypt, or leave it out",
        )),
        (None, false) => Ok(None),
    }
}

/// Refuses options that contradict each other.
fn check_options(
    args: &ConvertArgs,
    destination: &ImageLocation,
    format: Format,
    exists: bool,
) -> Result<(), CommandError> {
    let refuse = |message: &str| Err(CommandError::new(message));
    if args.compress && format != Format::Qcow2 {
        return refuse("--compress needs a qcow2 image as the result; add --output-format qcow2");
    }
    if args.bitmaps && format != Format::Qcow2 {
        return refuse("--bitmaps needs a qcow2 image as the result; add --output-format qcow2");
    }
    if args.bitmaps && args.qcow2.compat == Some(Compat::V2) {
        return refuse("--bitmaps needs version 3 of qcow2; omit --compat 0.10");
    }
    if args.no_create
        && args.output_format.is_none()
        && matches!(destination, ImageLocation::File(_))
    {
        return refuse(
            "--no-create needs the format of the existing image; add --output-format raw or \
             --output-format qcow2",
        );
    }
    if !exists && args.destination_is_zero {
        return refuse("--destination-is-zero is for disks that exist; add --no-create");
    }
    if exists && !args.format_options.options.is_empty() {
        return refuse("-o is for new images; omit it, or omit --no-create");
    }
    if exists && let Some(option) = args.qcow2.given().first() {
        return refuse(&format!("{option} is for new images; omit it, or omit --no-create"));
    }
    if args.json && matches!(destination, ImageLocation::Export { .. }) {
        return refuse("--json describes files; for an export use 'nbd-cli info --json'");
    }
    Ok(())
}

/// Refuses caches that the command does not control, or that contradict `--flush`.
fn check_caches(
    args: &ConvertArgs,
    from: &ImageLocation,
    destination: &ImageLocation,
) -> Result<(), CommandError> {
    let caches =
        [("--cache", args.cache, destination), ("--source-cache", args.source_cache, from)];
    for (option, cache, place) in caches {
        if let (Some(_), Some(uri)) = (cache, place.uri()) {
            return Err(CommandError::new(format!(
                "{option} is for files, and the server of {uri} decides how its disk is cached; \
                 leave it out"
            )));
        }
    }
    if args.flush && args.cache == Some(CacheMode::Unsafe) {
        return Err(CommandError::new(
            "--flush makes the result durable, and --cache unsafe forbids that; omit one of them",
        ));
    }
    Ok(())
}
