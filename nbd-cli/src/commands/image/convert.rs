//! `nbd-cli image convert`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use clap::Args;
use imgfmt::{
    Access, CreateOptions, Durability, ExtentKind, Format, GuestOffset, GuestRange, Image,
    OpenOptions, OpenPolicy, Syncing,
};

use super::create::Qcow2Args;
use super::open::{OpenArgs, explained};
use super::walk::{Extents, span};
use crate::commands::copy::zero::{Content, runs};
use crate::commands::serve::ImageFormat;
use crate::error::{CommandError, Outcome};
use crate::progress::{Progress, Visibility};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image convert --output-format qcow2 disk.img disk.qcow2
  nbd-cli image convert -O qcow2 --compress --compression-type zstd disk.img small.qcow2
  nbd-cli image convert --snapshot monday disk.qcow2 monday.img

The new image holds the whole disk and needs no backing file. Zeroes take up no space in it. A file
that exists is never touched; if the copy fails, what there was of the new image is removed.";

/// Smallest part of the disk that one thread copies at a time, in bytes.
const PIECE: u64 = 1 << 20;
/// Unit in which zeroes are looked for in a raw image, in bytes.
const RAW_UNIT: u64 = 4096;

/// Arguments of `nbd-cli image convert`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ConvertArgs {
    /// The image to copy.
    pub source: PathBuf,

    /// The new file.
    pub destination: PathBuf,

    /// Format of the new image.
    #[arg(short = 'O', long, value_enum, value_name = "FORMAT", default_value = "raw")]
    pub output_format: ImageFormat,

    /// Compress the clusters of a new qcow2 image.
    #[arg(short, long)]
    pub compress: bool,

    /// Copy this internal snapshot, given by name or id, in place of the present state.
    #[arg(short = 'l', long, value_name = "NAME")]
    pub snapshot: Option<String>,

    /// Threads that copy [default: as many as there are cores].
    #[arg(short, long, value_name = "N")]
    pub jobs: Option<NonZeroUsize>,

    /// Wait at the end until the new image is on stable storage.
    #[arg(long)]
    pub flush: bool,

    /// Show progress even if standard error is no terminal.
    #[arg(short, long)]
    pub progress: bool,

    /// Show no progress.
    #[arg(short, long, conflicts_with = "progress")]
    pub quiet: bool,

    #[command(flatten)]
    pub qcow2: Qcow2Args,

    #[command(flatten)]
    pub open: OpenArgs,
}

pub(crate) fn run(args: &ConvertArgs) -> Result<Outcome, CommandError> {
    let format = Format::from(args.output_format);
    if args.compress && format != Format::Qcow2 {
        return Err(CommandError::new(
            "--compress needs a qcow2 image as the result; add --output-format qcow2",
        ));
    }
    let mut options = args.open.options();
    options.snapshot.clone_from(&args.snapshot);
    let source = Image::open(&args.source, &options).map_err(explained)?;
    let mut create = CreateOptions::new(format, source.size());
    args.qcow2.apply(&mut create)?;
    Image::create(&args.destination, &create)?;
    let visibility = match (args.progress, args.quiet) {
        (true, _) => Visibility::Always,
        (_, true) => Visibility::Never,
        _ => Visibility::IfTerminal,
    };
    let progress = Progress::new(visibility, Some(source.size()));
    let result = fill(args, &source, &create, &progress);
    progress.clear();
    result.inspect_err(|_| {
        // We have made it, and part of a disk is of no use; the first error is the one to tell.
        let _ = std::fs::remove_file(&args.destination);
    })?;
    Ok(Outcome::Success)
}

fn fill(
    args: &ConvertArgs,
    source: &Image,
    create: &CreateOptions,
    progress: &Progress,
) -> Result<(), CommandError> {
    let options = OpenOptions::new()
        .format(create.format)
        .access(Access::ReadWrite)
        // Nobody relies on an image that is not finished: one sync at the end is enough.
        .syncing(Syncing::Off)
        .policy(OpenPolicy::deny());
    let destination = Image::open(&args.destination, &options)?;
    let unit = if create.format == Format::Raw { RAW_UNIT } else { create.cluster_size };
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let jobs = args.jobs.unwrap_or(cores).get().min(256);
    let copy = Copy {
        source,
        destination: &destination,
        unit,
        compress: args.compress,
        progress,
        failed: AtomicBool::new(false),
    };
    copy.run(jobs)?;
    destination.close()?;
    match args.flush {
        true => sync(&args.destination),
        false => Ok(()),
    }
}

/// Puts a finished image on stable storage.
fn sync(path: &Path) -> Result<(), CommandError> {
    let synced = std::fs::File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|error| CommandError::new(format!("cannot flush '{}': {error}", path.display())))
}

/// A copy into a new image, which reads as zero where nothing is written.
struct Copy<'a> {
    source: &'a Image,
    destination: &'a Image,
    /// Nothing smaller is written.
    unit: u64,
    compress: bool,
    progress: &'a Progress,
    /// One thread failed: the others need not go on.
    failed: AtomicBool,
}

impl Copy<'_> {
    fn run(&self, jobs: usize) -> Result<(), CommandError> {
        let (sender, receiver) = sync_channel(jobs * 2);
        let receiver = Arc::new(Mutex::new(receiver));
        std::thread::scope(|scope| {
            // Each worker has a share of the receiver: without any, handing out fails.
            let spawn = |_| {
                let receiver = Arc::clone(&receiver);
                scope.spawn(move || self.work(&receiver))
            };
            let workers: Vec<_> = (0..jobs).map(spawn).collect();
            drop(receiver);
            let mut result = self.find_work(&sender);
            drop(sender);
            for worker in workers {
                let ended = worker.join();
                let ended = ended.unwrap_or_else(|_| {
                    Err(CommandError::new("a thread that copied has ended unexpectedly"))
                });
                result = result.and(ended);
            }
            result
        })
    }

    /// Hands out the parts of the disk that hold data, whole units each.
    fn find_work(&self, sender: &SyncSender<GuestRange>) -> Result<(), CommandError> {
        let size = self.source.size();
        let piece = PIECE.max(self.unit);
        let mut extents = Extents::new(self.source);
        let mut done = 0;
        while let Some(extent) = extents.next()? {
            if extent.kind != ExtentKind::Data {
                continue;
            }
            let start = extent.range.offset().bytes() / self.unit * self.unit;
            let end = extent.range.end().bytes();
            let end = end.checked_next_multiple_of(self.unit).unwrap_or(size).min(size);
            let mut position = start.max(done);
            self.progress.add(position - done);
            while position < end {
                let stop = ((position / piece + 1) * piece).min(end);
                if self.failed.load(Ordering::Relaxed) || sender.send(span(position, stop)).is_err()
                {
                    return Ok(());
                }
                position = stop;
            }
            done = done.max(end);
        }
        self.progress.add(size - done);
        Ok(())
    }

    /// Copies what is handed out. After a failure the rest is only taken, so that handing it out
    /// never waits.
    fn work(&self, receiver: &Mutex<Receiver<GuestRange>>) -> Result<(), CommandError> {
        let mut buffer = vec![0; PIECE.max(self.unit) as usize];
        let mut result = Ok(());
        loop {
            let next = match receiver.lock() {
                Ok(receiver) => receiver.recv(),
                // Another thread ended unexpectedly, which its join tells.
                Err(_) => return result,
            };
            let Ok(range) = next else { return result };
            if self.failed.load(Ordering::Relaxed) {
                continue;
            }
            result = self.copy(range, &mut buffer[..range.length() as usize]);
            if result.is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
        }
    }

    fn copy(&self, range: GuestRange, buffer: &mut [u8]) -> Result<(), CommandError> {
        self.source.read_at(range.offset(), buffer)?;
        for run in runs(buffer, self.unit as usize) {
            if run.content == Content::Zero {
                continue;
            }
            let offset = GuestOffset::new(range.offset().bytes() + run.start as u64);
            let data = &buffer[run.start..run.end];
            if self.compress {
                self.destination.write_compressed(offset, data)?;
            } else {
                self.destination.write_at(offset, data, Durability::Cached)?;
            }
        }
        self.progress.add(range.length());
        Ok(())
    }
}
