//! `nbd-cli image create`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use imgfmt::{
    CompressionType, CreateOptions, DataFile, Format, Image, L2Entries, LazyRefcounts, NewKey,
    OpenPolicy, Qcow2Version,
};
use nbd_jobs::remote::allow_exports;
use nbd_jobs::size::ByteSize;
use nbd_jobs::target::{self, Durable, Existing, NewFile, device};
use nbd_jobs::{JobError, JobErrorKind};

use super::format_options::FormatOptions;
use super::info::print_json;
use super::open::pinned;
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::image_format::{ImageFormat, NewImageFormat, name_of_another_format};
use crate::key_file::KeyArgs;
use crate::locking::LockArgs;
use crate::new_key::IterTimeArgs;
use crate::output::warn;
use crate::shown::warnings;
use crate::signals;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image create disk.img 20G
  nbd-cli image create --format qcow2 --compression-type zstd disk.qcow2 20G
  nbd-cli image create --format qcow2 --encrypt --key-file - disk.qcow2 20G
  nbd-cli image create --format qcow2 --backing nbd://localhost/base --backing-format raw o.qcow2
  nbd-cli image create --format qcow2 --backing base.qcow2 --backing-format qcow2 overlay.qcow2

A relative name of a backing file starts at the directory of the new image. An existing file is never
changed: remove it first. The new image is NAME.partial until it is complete. The previous data of a
block device is lost at once, and the device is marked as incomplete until the image is complete.";

/// Arguments of `nbd-cli image create`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CreateArgs {
    /// The new file.
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// Size of the disk; may be omitted with --backing.
    pub size: Option<ByteSize>,

    /// Format of the image.
    #[arg(short, long, default_value = "raw")]
    pub format: NewImageFormat,

    /// Backing file, or an export of a server (an NBD URI), which provides the contents where the
    /// new image has none.
    #[arg(short, long, value_name = "FILE", requires = "backing_format")]
    pub backing: Option<OsString>,

    /// Format of the backing file.
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<ImageFormat>,

    /// Whether to allocate the complete disk now.
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub preallocation: Preallocation,

    /// Keep the data in this new file, and only the metadata in the qcow2 image. QEMU looks for a
    /// relative name in its own working directory, so an absolute one is better.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "backing",
        help_heading = "Options for qcow2"
    )]
    pub data_file: Option<OsString>,

    /// Keep the data file a valid raw image.
    #[arg(long, requires = "data_file", help_heading = "Options for qcow2")]
    pub data_file_raw: bool,

    /// Allow QEMU to leave refcounts wrong while the image is open; it repairs them after a crash.
    #[arg(long, help_heading = "Options for qcow2")]
    pub lazy_refcounts: bool,

    /// Encrypt the image with LUKS (AES-256, XTS); always the case with --format luks. The first
    /// --key-file has the passphrase.
    #[arg(long, requires = "key_file")]
    pub encrypt: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub keys: KeyArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub iter_time: IterTimeArgs,

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
    pub locks: LockArgs,
}

/// The properties of a new qcow2 image.
#[derive(Clone, Debug, Args)]
pub struct Qcow2Args {
    /// Size of a cluster: a power of two from 512 to 2M [default: 64K].
    #[arg(long, value_name = "SIZE", help_heading = "Options for qcow2")]
    pub cluster_size: Option<ByteSize>,

    /// Width of a refcount in bits: a power of two from 1 to 64 [default: 16].
    #[arg(long, value_name = "BITS", help_heading = "Options for qcow2")]
    pub refcount_bits: Option<u32>,

    /// Version of the format [default: 1.1].
    #[arg(long, value_enum, value_name = "VERSION", help_heading = "Options for qcow2")]
    pub compat: Option<Compat>,

    /// Compression of compressed clusters [default: zlib].
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Options for qcow2")]
    pub compression_type: Option<Compression>,

    /// Allocate parts of clusters (subclusters).
    #[arg(long, help_heading = "Options for qcow2")]
    pub extended_l2: bool,
}

/// The time at which space is allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Preallocation {
    /// Each part when it is written.
    #[default]
    Off,
    /// Clusters now, as holes of the file, and space when data is written; qcow2 images only.
    Metadata,
    /// Space now, without writing to it.
    Falloc,
    /// Space now, by writing zeroes.
    Full,
}

/// Versions of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compat {
    /// Version 2, which QEMU before 1.1 can read.
    #[value(name = "0.10", alias = "v2")]
    V2,
    /// Version 3.
    #[value(name = "1.1", alias = "v3")]
    V3,
}

/// The compression of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// Supported by every reader.
    Zlib,
    /// Faster; QEMU 5.1 and later.
    Zstd,
}

impl Qcow2Args {
    /// Returns the names of the given options.
    pub(super) fn given(&self) -> Vec<&'static str> {
        let options = [
            ("--cluster-size", self.cluster_size.is_some()),
            ("--refcount-bits", self.refcount_bits.is_some()),
            ("--compat", self.compat.is_some()),
            ("--compression-type", self.compression_type.is_some()),
            ("--extended-l2", self.extended_l2),
        ];
        options.iter().filter(|(_, is_given)| *is_given).map(|(option, _)| *option).collect()
    }

    /// Sets the options of a new image, or reports one that it cannot have.
    pub(super) fn apply(&self, options: &mut CreateOptions) -> Result<(), CommandError> {
        if let (true, Some(option)) = (options.format != Format::Qcow2, self.given().first()) {
            let format = options.format;
            return Err(CommandError::new(format!(
                "a {format} image has no {option}; omit it or create a qcow2 image"
            )));
        }
        if let Some(size) = self.cluster_size {
            options.cluster_size = size.bytes();
        }
        if let Some(bits) = self.refcount_bits {
            options.refcount_bits = bits;
        }
        if self.compat == Some(Compat::V2) {
            options.version = Qcow2Version::V2;
        }
        if self.compression_type == Some(Compression::Zstd) {
            options.compression = CompressionType::Zstd;
        }
        if self.extended_l2 {
            options.l2_entries = L2Entries::Extended;
        }
        Ok(())
    }
}

pub(crate) fn run(args: &CreateArgs) -> Result<Outcome, CommandError> {
    let mut options = CreateOptions::new(args.format.into(), 0);
    if let Some(why) = name_of_another_format(&args.path, options.format, "--format") {
        warn(&why);
    }
    if args.format_options.help(&options)? {
        return Ok(Outcome::Success);
    }
    options.size = args.size.map(ByteSize::bytes);
    options.open.locking = args.locks.locking();
    options.open.policy = allow_exports(OpenPolicy::any_file(), &ServerArgs::default().remotes());
    let backing = args.backing.as_deref().map(pinned);
    options.backing = backing.transpose()?.zip(args.backing_format.map(Format::from));
    args.qcow2.apply(&mut options)?;
    args.format_options.apply(&mut options, &given_flags(args))?;
    if options.size.is_none() && options.backing.is_none() {
        return Err(CommandError::new(format!(
            "cannot create '{}': the size of its disk is missing; give it after the name, such as 10G",
            args.path.display()
        )));
    }
    options.foreign.final_name = target::final_name(&args.path);
    if args.lazy_refcounts && options.format != Format::Qcow2 {
        return Err(CommandError::new(format!(
            "a {} image has no --lazy-refcounts; omit it or create a qcow2 image",
            options.format
        )));
    }
    if args.preallocation != Preallocation::Off {
        options.preallocation = preallocation(args, options.format)?;
    }
    let kind = if args.data_file_raw { DataFile::Raw } else { DataFile::Plain };
    options.data_file = args.data_file.clone().map(|name| (name, kind));
    if args.lazy_refcounts {
        options.lazy_refcounts = LazyRefcounts::On;
    }
    options.encryption = encryption(args, options.format)?;
    // For an encrypted backing file.
    options.open.passphrases = args.keys.passphrases();
    options.give_up = || signals::caught().is_some();
    let create = |path: &Path| {
        Image::create(path, &options).map_err(|error| match signals::stop_if_interrupted() {
            Err(interrupted) => CommandError::new(format!(
                "cannot create '{}': {interrupted}; its incomplete files were removed",
                args.path.display()
            )),
            Ok(()) if error.kind() == imgfmt::ErrorKind::KeyRequired => {
                JobError::opening(JobErrorKind::Source, error).into()
            }
            Ok(()) => error.into(),
        })
    };
    match target::look(&args.path)? {
        Existing::BlockDevice => {
            let new = device::begin_image(&args.path, &options, &*warnings())?;
            device::complete_image(&args.path, new)?;
        }
        _ => {
            let (mut new, image) = NewFile::begin(&args.path, &warnings(), create)?;
            new.add_extents(&image, args.locks.locking())?;
            image.close()?;
            new.complete(Durable::Now)?;
        }
    }
    if args.json {
        print_json(&args.path, &args.locks.options().format(options.format))?;
    }
    Ok(Outcome::Success)
}

/// The given options that can be given by `-o` too.
fn given_flags(args: &CreateArgs) -> Vec<&'static str> {
    let mut flags = args.qcow2.given();
    flags.extend(args.lazy_refcounts.then_some("--lazy-refcounts"));
    flags.extend((args.preallocation != Preallocation::Off).then_some("--preallocation"));
    flags
}

/// The key of an encrypted image.
fn encryption(args: &CreateArgs, format: Format) -> Result<Option<NewKey>, CommandError> {
    match (args.keys.key_file.first(), args.encrypt || format == Format::Luks) {
        (Some(file), true) => args.iter_time.key(file).map(Some),
        (None, true) => Err(CommandError::new(
            "an encrypted image needs a passphrase; add --key-file FILE, or --key-file - to be asked",
        )),
        (Some(_), false) if args.backing.is_none() => Err(CommandError::new(
            "--key-file is given, but nothing is encrypted; add --encrypt, or leave it out",
        )),
        (_, false) => Ok(None),
    }
}

/// Converts to the library's preallocation.
fn preallocation(args: &CreateArgs, format: Format) -> Result<imgfmt::Preallocation, CommandError> {
    use imgfmt::Preallocation as Kind;
    match args.preallocation {
        Preallocation::Off => Ok(Kind::Off),
        Preallocation::Metadata if format != Format::Qcow2 => Err(CommandError::new(
            "--preallocation metadata is for qcow2 images; for others use off, falloc or full",
        )),
        Preallocation::Metadata => Ok(Kind::Metadata),
        Preallocation::Falloc => Ok(Kind::Falloc),
        Preallocation::Full => Ok(Kind::Full),
    }
}
