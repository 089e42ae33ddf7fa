//! `nbd-cli image commit`.

use std::path::{Path, PathBuf};

use clap::Args;
use imgfmt::{
    Access, Durability, ExtentKind, Format, Image, Locking, OpenOptions, Shrink, Speed, ZeroMode,
};

use super::info::print_json;
use super::open::{TrustArgs, explained, options};
use super::place::Place;
use super::walk::{Extents, span};
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::image_format::ImageFormat;
use crate::progress::{Progress, ProgressArgs};
use crate::signals;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image commit overlay.qcow2
  nbd-cli image commit --keep overlay.qcow2

What the overlay holds is written into its backing file, which then holds the same disk, and the
overlay is emptied. Other overlays of the same backing file see its content change and are
corrupted: commit only into a file that no other image relies on.

If a commit fails or is interrupted, the overlay still shows the whole disk; commit it again.";

/// How much is copied at a time, in bytes.
const STEP: u64 = 1 << 20;

/// Arguments of `nbd-cli image commit`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CommitArgs {
    /// The overlay.
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// Format of the overlay; detected unless given.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    /// Do not empty the overlay: for one that is deleted afterwards.
    #[arg(long)]
    pub keep: bool,

    #[command(flatten)]
    pub progress: ProgressArgs,

    /// Print what the overlay is like then, as `nbd-cli image info --json` does.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub trust: TrustArgs,
}

pub(crate) fn run(args: &CommitArgs) -> Result<Outcome, CommandError> {
    let shared = options(args.format, &args.trust);
    // Held until the end. The chain itself is opened without locks, or its read lock on the
    // backing file would keep us from writing there.
    let overlay_lock = args.trust.locks.open_file(&args.path, Access::ReadWrite)?;
    let unlocked = shared.clone().locking(Locking::Off);
    let overlay = Image::open(&args.path, &unlocked);
    let overlay = overlay.map_err(explained)?;
    let (place, format) = backing_of(args, &overlay)?;
    let mut backing_options: OpenOptions = shared.access(Access::ReadWrite);
    backing_options.format = format;
    let mut backing = place.open(&backing_options, &ServerArgs::default())?;
    if backing.size() < overlay.size() {
        backing.resize(overlay.size(), Shrink::Refuse)?;
    }
    let progress = Progress::new(args.progress.visibility(), Some(overlay.size()));
    let copied = copy(&overlay, &backing, &progress);
    progress.clear();
    copied.map_err(|error| {
        CommandError::new(format!(
            "{error}; the overlay still shows the whole disk: commit it again"
        ))
    })?;
    backing.close()?;
    drop(overlay);
    if !args.keep {
        empty(&args.path, &unlocked.access(Access::ReadWrite)).map_err(|error| {
            let name = args.path.display();
            CommandError::new(format!("'{name}' is committed, but cannot be emptied: {error}"))
        })?;
    }
    drop(overlay_lock);
    if args.json {
        print_json(&args.path, &options(Some(ImageFormat::Qcow2), &args.trust))?;
    }
    Ok(Outcome::Success)
}

fn empty(path: &Path, options: &OpenOptions) -> imgfmt::Result<()> {
    let mut overlay = Image::open(path, options)?;
    overlay.clear()?;
    overlay.close()
}

/// The file or export to write into. The overlay could be opened, so the policy allows it.
fn backing_of(args: &CommitArgs, overlay: &Image) -> Result<(Place, Option<Format>), CommandError> {
    let qcow2 = overlay.info()?.qcow2;
    let Some((name, format)) =
        qcow2.and_then(|info| info.backing_name.zip(Some(info.backing_format)))
    else {
        return Err(CommandError::new(format!(
            "cannot commit '{}': it has no backing file",
            args.path.display()
        )));
    };
    // The chain could be opened: what is neither is another name of raw images.
    let format = format.map(|name| Format::from_name(&name).unwrap_or(Format::Raw));
    Ok((Place::File(args.path.clone()).beside(&name)?, format))
}

fn copy(overlay: &Image, backing: &Image, progress: &Progress) -> Result<(), CommandError> {
    let mut extents = Extents::new(overlay);
    let mut buffer = vec![0; STEP as usize];
    while let Some(extent) = extents.next()? {
        // Only what the overlay itself holds: the layers below are being changed.
        if extent.depth == 1 && extent.kind == ExtentKind::Data {
            let mut position = extent.range.offset();
            while position < extent.range.end() {
                signals::stop_if_interrupted()?;
                let rest = span(position.bytes(), extent.range.end().bytes());
                let data = &mut buffer[..rest.length().min(STEP) as usize];
                overlay.read_at(position, data)?;
                backing.write_at(position, data, Durability::Cached)?;
                position = (position.bytes() + data.len() as u64).into();
            }
        } else if extent.depth == 1 {
            let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
            backing.write_zeroes(extent.range, mode, speed, Durability::Cached)?;
        }
        progress.add(extent.range.length());
    }
    Ok(())
}
