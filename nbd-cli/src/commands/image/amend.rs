//! `nbd-cli image amend`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum};
use imgfmt::{Amendment, Image, LazyRefcounts, Qcow2Version};
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::size::ByteSize;

use super::create::Compat;
use super::format_options::refuse_twice;
use super::info::print_json;
use super::open::{OpenArgs, explained};
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::output::printable;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image amend --compat 1.1 old.qcow2
  nbd-cli image amend --compat 0.10 --refcount-bits 16 disk.qcow2
  nbd-cli image amend --lazy-refcounts off disk.qcow2
  nbd-cli image amend -o compat=v3,size=20G disk.qcow2

The contents of the disk, its snapshots and its bitmaps do not change. The image must not be in use.
If the command is interrupted, the disk remains readable; run the command again. Version 0.10
supports neither bitmaps nor zstd compression, subclusters, a data file, or zero clusters: features
that cannot be converted are refused, and zeroes above a backing file then occupy space.

For the backing file see 'image rebase', for a smaller disk 'image resize --shrink'; for other changes
create a new image with 'image convert'.";

/// Arguments of `nbd-cli image amend`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(group(ArgGroup::new("change").required(true).multiple(true)
    .args(["compat", "lazy_refcounts", "refcount_bits", "size", "options"])))]
pub struct AmendArgs {
    /// The image.
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// Version of the format.
    #[arg(long, value_enum, value_name = "VERSION")]
    pub compat: Option<Compat>,

    /// Whether QEMU may leave refcounts wrong while the image is open.
    #[arg(long, value_enum, value_name = "WHETHER")]
    pub lazy_refcounts: Option<OnOff>,

    /// Width of a refcount in bits, a power of two from 1 to 64.
    #[arg(long, value_name = "BITS")]
    pub refcount_bits: Option<u32>,

    /// Size of the disk; it can only grow.
    #[arg(long, value_name = "SIZE")]
    pub size: Option<ByteSize>,

    /// The same as key=value,key=value, with the keys of qemu-img amend: compat, lazy_refcounts,
    /// refcount_bits, size.
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Vec<String>,

    /// Print the changed image, like `nbd-cli image info --json`.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub open: OpenArgs,
}

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// QEMU may.
    On,
    /// QEMU may not.
    Off,
}

pub(crate) fn run(args: &AmendArgs) -> Result<Outcome, CommandError> {
    let mut amendment = Amendment::default();
    for options in &args.options {
        read_options(options, &given_flags(args), &mut amendment)?;
    }
    if let Some(compat) = args.compat {
        amendment.version = Some(version(compat));
    }
    if let Some(lazy) = args.lazy_refcounts {
        amendment.lazy_refcounts = Some(lazy_refcounts(lazy));
    }
    amendment.refcount_bits = args.refcount_bits.or(amendment.refcount_bits);
    amendment.size = args.size.map(ByteSize::bytes).or(amendment.size);
    if let Some(size) = amendment.size {
        let present =
            Image::inspect_file(&args.path, &args.open.options()).map_err(explained)?.size;
        if size < present {
            return Err(CommandError::new(format!(
                "'{}' has {present} bytes and would lose all beyond {size}: use 'nbd-cli image resize \
                 --shrink' if that is meant",
                args.path.display()
            )));
        }
    }
    Image::amend(&args.path, &args.open.options(), &amendment).map_err(explained)?;
    if args.json {
        print_json(&args.path, &args.open.options())?;
    }
    Ok(Outcome::Success)
}

fn version(compat: Compat) -> Qcow2Version {
    match compat {
        Compat::V2 => Qcow2Version::V2,
        Compat::V3 => Qcow2Version::V3,
    }
}

fn lazy_refcounts(lazy: OnOff) -> LazyRefcounts {
    match lazy {
        OnOff::On => LazyRefcounts::On,
        OnOff::Off => LazyRefcounts::Off,
    }
}

/// The given options that can be given by `-o` too.
fn given_flags(args: &AmendArgs) -> Vec<&'static str> {
    let flags = [
        ("--compat", args.compat.is_some()),
        ("--lazy-refcounts", args.lazy_refcounts.is_some()),
        ("--refcount-bits", args.refcount_bits.is_some()),
        ("--size", args.size.is_some()),
    ];
    flags.into_iter().filter(|(_, is_given)| *is_given).map(|(flag, _)| flag).collect()
}

/// Parses options in qemu-img's syntax.
fn read_options(text: &str, flags: &[&str], amendment: &mut Amendment) -> Result<(), CommandError> {
    let mut options = KeyValues::parse(text, None).map_err(CommandError::new)?;
    refuse_twice(&options, flags)?;
    let bad = |key: &str, value: &str| {
        CommandError::new(format!("'{}' is not a value of {key}", printable(value)))
    };
    if let Some(value) = options.take("compat") {
        let compat = Compat::from_str(&value, true).map_err(|_| bad("compat", &value))?;
        amendment.version = Some(version(compat));
    }
    if let Some(value) = options.take("lazy_refcounts") {
        let lazy = OnOff::from_str(&value, true).map_err(|_| bad("lazy_refcounts", &value))?;
        amendment.lazy_refcounts = Some(lazy_refcounts(lazy));
    }
    if let Some(value) = options.take("refcount_bits") {
        let bits = value.parse().map_err(|_| bad("refcount_bits", &value))?;
        amendment.refcount_bits = Some(bits);
    }
    if let Some(value) = options.take("size") {
        let size: ByteSize = value.parse().map_err(|_| bad("size", &value))?;
        amendment.size = Some(size.bytes());
    }
    match options.left_over() {
        None => Ok(()),
        Some(key) => Err(CommandError::new(format!(
            "'{}' cannot be amended: {}",
            printable(key),
            advice(key)
        ))),
    }
}

/// Returns the alternative for an option that is fixed when an image is created.
fn advice(key: &str) -> &'static str {
    match key {
        "backing_file" | "backing_fmt" => "use 'nbd-cli image rebase'",
        "data_file" => "rename the data file to the name in the image",
        "data_file_raw" => {
            "whether the data file is a raw image is fixed when the image is created, with 'nbd-cli image \
             create --data-file-raw'"
        }
        "preallocation" | "cluster_size" | "compression_type" | "extended_l2" => {
            "create a new image with 'nbd-cli image convert'"
        }
        key if key.starts_with("encrypt") => {
            "passphrases of encrypted images are changed by 'nbd-cli image key'"
        }
        _ => "there is no such option; use compat, lazy_refcounts, refcount_bits or size",
    }
}
