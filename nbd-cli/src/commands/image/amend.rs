//! `nbd-cli image amend`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum};
use imgfmt::{Amendment, Image, LazyRefcounts, Qcow2Version};

use super::create::Compat;
use super::info::print_json;
use super::open::{OpenArgs, explained};
use crate::error::{CommandError, Outcome};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image amend --compat 1.1 old.qcow2
  nbd-cli image amend --lazy-refcounts off disk.qcow2

Only the header changes; the disk, its snapshots and its bitmaps stay as they are. Nobody else may
use the image meanwhile. For the size see 'image resize', for the backing file 'image rebase'; for
anything else make a new image with 'image convert'.";

/// Arguments of `nbd-cli image amend`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(group(ArgGroup::new("change").required(true).multiple(true).args(["compat", "lazy_refcounts"])))]
pub struct AmendArgs {
    /// The image.
    pub path: PathBuf,

    /// Version of the format: version 2 can become version 3.
    #[arg(long, value_enum, value_name = "VERSION")]
    pub compat: Option<Compat>,

    /// Whether QEMU may leave refcounts wrong while it has the image open.
    #[arg(long, value_enum, value_name = "WHETHER")]
    pub lazy_refcounts: Option<OnOff>,

    /// Print what the image is like then, as `nbd-cli image info --json` does.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub open: OpenArgs,
}

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// It may.
    On,
    /// It may not.
    Off,
}

pub(crate) fn run(args: &AmendArgs) -> Result<Outcome, CommandError> {
    let mut amendment = Amendment::default();
    amendment.version = args.compat.map(|compat| match compat {
        Compat::V2 => Qcow2Version::V2,
        Compat::V3 => Qcow2Version::V3,
    });
    amendment.lazy_refcounts = args.lazy_refcounts.map(|lazy| match lazy {
        OnOff::On => LazyRefcounts::On,
        OnOff::Off => LazyRefcounts::Off,
    });
    Image::amend(&args.path, &args.open.options(), &amendment).map_err(explained)?;
    if args.json {
        print_json(&args.path, &args.open.options())?;
    }
    Ok(Outcome::Success)
}
