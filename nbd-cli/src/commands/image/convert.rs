//! `nbd-cli image convert`.

mod bitmaps;
mod reader;

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use imgfmt::jobs::{
    Background, Clusters, ConvertOptions, JobError, JobErrorKind, SourceReader, convert,
    copy_bitmaps,
};
use imgfmt::{
    Access, BitmapInfo, CacheMode, CreateOptions, Format, Image, IncompleteDisk, OpenOptions,
    OpenPolicy,
};
use nbd_jobs::target::{self, Durable, Existing, NewFile, device};
use nbd_proto::NbdUri;

use self::reader::ExportReader;
use super::create::{Compat, Qcow2Args};
use super::open::OpenArgs;
use super::place::ImageLocation;
use crate::connect::{ServerArgs, refuse_same_export};
use crate::error::{CommandError, Outcome};
use crate::image_format::{ImageFormat, name_of_another_format};
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::warn;
use crate::progress::ProgressArgs;
use crate::shown::{Shown, warnings};
use crate::size::parse_duration;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image convert --output-format qcow2 disk.img disk.qcow2
  nbd-cli image convert -O qcow2 --compress --compression-type zstd disk.img small.qcow2
  nbd-cli image convert --snapshot monday disk.qcow2 monday.img
  nbd-cli image convert -O qcow2 --bitmaps disk.qcow2 copy.qcow2
  nbd-cli image convert disk.qcow2 nbd://localhost/disk
  nbd-cli image convert -O qcow2 nbd://localhost/disk disk.qcow2
  nbd-cli image convert --no-create -O raw disk.qcow2 /dev/vg/disk

The new image contains the whole disk and needs no backing file. Zeroes occupy no space in it. An
existing file is never changed, unless --no-create allows overwriting the disk in it. A new image
grows as NAME.partial and is renamed when it is complete; if the copy fails or is interrupted, it is
removed (after kill -9 NAME.partial is left), and an existing disk remains incomplete. The previous
data of a block device, which needs no --no-create, is lost at once; the device is marked as
incomplete until everything is on stable storage, so that a part of a disk is never mistaken for the
whole.

An export of an NBD server can be the source or the destination; a destination has to be large
enough, and --no-create is implied.

With --bitmaps the dirty bitmaps of the source are copied, with their granularity and enabled state.
The new image does not record after which backup they started: an incremental backup of it needs
--trust-base. Bitmaps of backing files are never copied.

The result is complete in memory when the command ends; --flush waits until it is on the disk.";

/// Most rounds that may end with a new connection before a copy to a server fails.
const MOST_ROUNDS: usize = 8;
/// Default number of threads that copy to or from a server: most of them wait.
const REMOTE_JOBS: NonZeroUsize = NonZeroUsize::new(8).expect("it is not zero");

/// Arguments of `nbd-cli image convert`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ConvertArgs {
    /// The image to copy: a file, or an export as an NBD URI.
    pub source: OsString,

    /// The new file, or an export as an NBD URI.
    pub destination: OsString,

    /// Format of the new image [default: raw].
    #[arg(short = 'O', long, value_name = "FORMAT")]
    pub output_format: Option<ImageFormat>,

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

    /// Leave out unreliable bitmaps; without this they are an error.
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

    #[command(flatten)]
    pub progress: ProgressArgs,

    /// Print the new image, like `nbd-cli image info --json`.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub qcow2: Qcow2Args,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    #[command(flatten)]
    pub open: OpenArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

pub(crate) fn run(args: &ConvertArgs) -> Result<Outcome, CommandError> {
    let [from, destination] = ImageLocation::parse_two(
        [&args.source, &args.destination],
        &args.server,
        &args.open.trust,
    )?;
    refuse_same_export(from.uri(), destination.uri())?;
    if let ImageLocation::Described { .. } = destination {
        return Err(CommandError::new(
            "the new image is given by its name, and its format by --output-format",
        ));
    }
    let exists = args.no_create || matches!(destination, ImageLocation::Export { .. });
    let format = args.output_format.map_or(Format::Raw, Format::from);
    check_options(args, &destination, format, exists)?;
    if let (ImageLocation::File(path), false) = (&destination, exists)
        && let Some(why) = name_of_another_format(path, format, "--output-format")
    {
        warn(&why);
    }
    let patient = ServerArgs { reconnect: Some(args.reconnect), ..args.server.clone() };
    let mut read = args.share.apply(args.open.options_with(&patient));
    read.snapshot.clone_from(&args.snapshot);
    let (source, export) = from.open_disk_or_image(&read, &patient).map_err(advise_sharing)?;
    let is_remote = [&from, &destination].iter().any(|place| place.uri().is_some());
    let shown = Shown::new(args.progress.visibility());
    let bitmaps = match args.bitmaps {
        true => bitmaps::of_source(&source, &from, args.skip_broken_bitmaps)?,
        false => Vec::new(),
    };
    let reader = export.map(|export| {
        Arc::new(ExportReader::new(export, from.to_string())) as Arc<dyn SourceReader>
    });
    let (source, from, patient, shown) = (&source, &from, &patient, &shown);
    let copy =
        Conversion { args, patient, source, reader, from, bitmaps, format, is_remote, shown };
    let result = match (&destination, exists) {
        (ImageLocation::File(path), _) => match (target::look(path)?, format) {
            // The device is the disk.
            (Existing::BlockDevice, Format::Raw) => copy.overwrite_device(path),
            _ if exists => copy.replace(&destination),
            (Existing::BlockDevice, _) => copy.make_on_device(path),
            _ => copy.make_new(path),
        },
        (ImageLocation::Export { uri, .. }, _) if format == Format::Raw => {
            copy.to_server(&destination, uri)
        }
        _ => copy.replace(&destination),
    };
    match &result {
        Ok(()) => shown.finish(),
        Err(_) => shown.clear(),
    }
    result?;
    if let (ImageLocation::File(path), true) = (&destination, args.json) {
        super::info::print_json(path, &args.open.trust.options().format(format))?;
    }
    Ok(Outcome::Success)
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
        return refuse("--bitmaps needs version 3 of qcow2; leave out --compat 0.10");
    }
    if args.no_create
        && args.output_format.is_none()
        && matches!(destination, ImageLocation::File(_))
    {
        return refuse(
            "--no-create needs the format of the image that is there; add --output-format raw or \
             --output-format qcow2",
        );
    }
    if !exists && args.destination_is_zero {
        return refuse("--destination-is-zero is for disks that exist; add --no-create");
    }
    if exists && let Some(option) = args.qcow2.given() {
        return refuse(&format!(
            "{option} is for images that are made; leave it out or leave out --no-create"
        ));
    }
    if args.json && matches!(destination, ImageLocation::Export { .. }) {
        return refuse("--json describes files; for an export use 'nbd-cli info --json'");
    }
    Ok(())
}

/// Returns the error with the state it leaves.
fn left(error: &CommandError, left: &str) -> CommandError {
    CommandError::new(format!("{error}; {left}"))
}

fn incomplete(to: &ImageLocation, error: &CommandError) -> CommandError {
    CommandError::new(format!("{error}; the disk in {to} is incomplete: run the command again"))
}

/// The source and the options of the copy.
struct Conversion<'a> {
    args: &'a ConvertArgs,
    /// For connections that may be replaced when they are lost.
    patient: &'a ServerArgs,
    source: &'a Image,
    /// Reads the source, if it fills another server's export.
    reader: Option<Arc<dyn SourceReader>>,
    from: &'a ImageLocation,
    /// The bitmaps of the source to copy.
    bitmaps: Vec<BitmapInfo>,
    format: Format,
    is_remote: bool,
    shown: &'a Arc<Shown>,
}

impl Conversion<'_> {
    /// Creates the image; after an error no file remains.
    fn make_new(&self, path: &Path) -> Result<(), CommandError> {
        let mut create = CreateOptions::new(self.format, self.source.size());
        self.args.qcow2.apply(&mut create)?;
        create.open = self.for_filling();
        let make = |path: &Path| Image::create(path, &create).map_err(CommandError::from);
        let (new, image) = NewFile::begin(path, &warnings(), make)?;
        let filled = self.fill(image, new.path());
        filled.map_err(|error| left(&error, &new.left_behind()))?;
        Ok(new.complete(if self.args.flush { Durable::Now } else { Durable::Later })?)
    }

    /// Creates the image on a device, whose content is lost.
    fn make_on_device(&self, path: &Path) -> Result<(), CommandError> {
        let mut create = CreateOptions::new(self.format, self.source.size());
        self.args.qcow2.apply(&mut create)?;
        let new = device::begin_image(path, &create, &*warnings())?;
        let filled = new
            .open(&self.for_filling())
            .map_err(CommandError::from)
            .and_then(|image| self.fill(image, path))
            .and_then(|()| Ok(new.complete()?));
        filled.map_err(|error| left(&error, &device::left_behind(path)))
    }

    /// Returns the options for opening the new image.
    fn for_filling(&self) -> OpenOptions {
        OpenOptions::new()
            .locking(self.args.open.trust.locks.locking())
            .format(self.format)
            .access(Access::ReadWrite)
            // An unfinished image need not be durable: one sync at the end is enough.
            .cache(CacheMode::Unsafe)
            .policy(OpenPolicy::deny())
    }

    fn fill(&self, image: Image, path: &Path) -> Result<(), CommandError> {
        self.copy(&image, &ImageLocation::File(path.to_owned()), Background::Zero)?;
        copy_bitmaps(self.source, &image, &self.bitmaps)?;
        Ok(image.close()?)
    }

    /// Writes the disk onto a device, raw.
    fn overwrite_device(&self, path: &Path) -> Result<(), CommandError> {
        self.args.qcow2.apply(&mut CreateOptions::new(self.format, self.source.size()))?;
        let disk = device::begin_disk(path, self.args.open.trust.locks.locking())?;
        let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
        let image = Image::from_storage(disk.clone(), &options)?;
        let to = ImageLocation::File(path.to_owned());
        self.check_room(&to, &image)?;
        device::warn_of_loss(path, &*warnings());
        let copied = self.copy(&image, &to, self.background()).and_then(|()| Ok(image.close()?));
        copied.map_err(|error| left(&error, &device::left_behind_on(path, &disk)))?;
        Ok(device::complete_disk(path, &disk)?)
    }

    /// Overwrites the existing disk.
    fn replace(&self, to: &ImageLocation) -> Result<(), CommandError> {
        let policy = self.args.open.trust.policy_with(&self.args.server);
        let options = self.args.open.trust.locks.options();
        let options = options.format(self.format).access(Access::ReadWrite).policy(policy);
        // This command was told to be run again.
        let options = options.incomplete(IncompleteDisk::Accepted);
        let image = to.open(&options, &self.args.server)?;
        self.check_room(to, &image)?;
        bitmaps::check_existing(&self.bitmaps, self.source, &image, to)?;
        image.begin_overwrite().map_err(|error| to.named(error))?;
        self.copy(&image, to, self.background()).map_err(|error| incomplete(to, &error))?;
        if self.format != Format::Raw {
            image.complete_overwrite().map_err(|error| incomplete(to, &to.named(error)))?;
        }
        copy_bitmaps(self.source, &image, &self.bitmaps).map_err(|error| self.named(to, error))?;
        if self.args.flush {
            return image.close().map_err(|error| to.named(error));
        }
        // Changes of metadata must not be lost; data is as durable as any other write.
        match self.format {
            Format::Raw => Ok(()),
            _ => image.close().map_err(|error| to.named(error)),
        }
    }

    /// Overwrites the disk of a server. If the server restarts in between, it may have lost writes
    /// that were not durable: then everything is written again.
    fn to_server(&self, to: &ImageLocation, uri: &NbdUri) -> Result<(), CommandError> {
        let (image, client) = to.open_disk(self.patient)?;
        self.check_room(to, &image)?;
        for _ in 0..MOST_ROUNDS {
            let before = client.reconnects();
            self.copy(&image, to, self.background()).map_err(|error| incomplete(to, &error))?;
            if self.args.flush {
                image.flush().map_err(|error| incomplete(to, &to.named(error)))?;
            }
            if client.reconnects() == before {
                return Ok(());
            }
            warn(&format!(
                "the connection to {uri} was lost, and its server may have lost what was not flushed: \
                 everything is written again"
            ));
        }
        Err(incomplete(
            to,
            &CommandError::new(format!("the connection to {uri} is lost again and again")),
        ))
    }

    fn check_room(&self, to: &ImageLocation, image: &Image) -> Result<(), CommandError> {
        let (room, size) = (image.size(), self.source.size());
        if room < size {
            return Err(CommandError::new(format!(
                "{to} has {room} bytes and the source {size}: it does not fit"
            )));
        }
        Ok(())
    }

    fn background(&self) -> Background {
        if self.args.destination_is_zero { Background::Zero } else { Background::Unknown }
    }

    fn copy(
        &self,
        image: &Image,
        to: &ImageLocation,
        background: Background,
    ) -> Result<(), CommandError> {
        let mut options = ConvertOptions::default();
        if self.is_remote {
            options.threads = REMOTE_JOBS;
        }
        options.threads = self.args.jobs.unwrap_or(options.threads);
        options.background = background;
        if self.args.compress {
            options.clusters = Clusters::Compressed;
        }
        options.reader.clone_from(&self.reader);
        let converted = convert(self.source, image, &options, &self.shown.image_context());
        converted.map(drop).map_err(|error| self.named(to, error))
    }

    /// Returns the error with the name of the place at fault, if it has none yet.
    fn named(&self, to: &ImageLocation, error: JobError) -> CommandError {
        let place = match error.kind() {
            JobErrorKind::Source => self.from,
            _ => to,
        };
        match error.into_image_error() {
            Ok(error) => place.named(error),
            Err(error) => error.into(),
        }
    }
}
