//! `nbd-cli mount`: disks and their partitions as files.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::Args;
use imgfmt::Access;
use nbd_jobs::JobContext;
use nbd_jobs::frozen_bits::report_thaw;
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::mount::{MountOptions, MountSource, Mounted, mount};
use nbd_jobs::tasks;

use super::image::location;
use super::image::open::{TrustArgs, options};
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::ImageFormat;
use crate::locking::{ShareArgs, advise_sharing};
use crate::logging;
use crate::output::{Output, unless_closed};
use crate::progress::Visibility;
use crate::serving::background::{self, Role};
use crate::serving::{runtime, service_manager};
use crate::shown::Shown;
use crate::signals::{EndSignals, Hangup};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli mount disk.qcow2 /mnt                     /mnt/disk, and /mnt/p1 … for its partitions
  nbd-cli mount --fork --files backup.qcow2 /mnt    cp /mnt/files/p1/etc/fstab .
  nbd-cli mount --writable disk.qcow2 /mnt          mkfs.ext4 /mnt/p1
  nbd-cli mount nbd://localhost/disk /mnt
  umount /mnt                                       as a user: fusermount3 -u /mnt

The program runs until the directory is unmounted, or until SIGTERM or SIGINT: then it completes the
requests in flight, makes what was written durable and unmounts. The paths of the disks and their
partitions are printed when they can be used. Only the user who mounts has access.";

/// Arguments of `nbd-cli mount`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct MountArgs {
    /// The disks: images, the newest files of backups, or exports as NBD URIs. Several get a
    /// directory each.
    #[arg(required = true, value_name = "SOURCE")]
    pub sources: Vec<OsString>,

    /// The directory to mount on.
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,

    /// Format of the images; detected unless given.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    /// Show this internal snapshot, given by name or id, instead of the active state.
    #[arg(short, long, value_name = "NAME")]
    pub snapshot: Option<String>,

    /// Let programs write to the disks.
    #[arg(short, long, conflicts_with_all = ["snapshot", "files", "force_share"])]
    pub writable: bool,

    /// Show the files inside ext2, ext3, ext4 and FAT file systems as well, read-only, below the
    /// directory `files`. Needs neither root nor loop devices.
    #[arg(long)]
    pub files: bool,

    /// Return when the disks can be used, and continue in the background.
    #[arg(long)]
    pub fork: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub trust: TrustArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,

    /// The role of this process with --fork.
    #[arg(skip)]
    pub role: Role,

    /// Whether the log continues in the background.
    #[arg(skip)]
    pub keeps_log: bool,
}

pub(crate) fn run(args: MountArgs) -> Result<Outcome, CommandError> {
    if args.role == Role::Background {
        background::leave_session();
    }
    tasks::block_on(&runtime()?, serve(args))
}

async fn serve(args: MountArgs) -> Result<Outcome, CommandError> {
    let mut signals = EndSignals::new(Hangup::Ends)?;
    let (role, keeps_log) = (args.role, args.keeps_log);
    let mut mounted = signals.meanwhile(blocking(move || start(&args))).await?;
    if let Err(error) = announce(&mounted) {
        blocking(move || Ok(mounted.end()?)).await?;
        return Err(error);
    }
    if role == Role::Background {
        background::ready(keeps_log)?;
    }
    logging::include_warnings();
    service_manager::ready();
    let unmounted = tokio::select! {
        unmounted = mounted.unmounted() => unmounted,
        _ = signals.next() => Ok(()),
    };
    service_manager::stopping();
    let ended = blocking(move || Ok(mounted.end()?));
    let ended = tokio::select! {
        ended = ended => ended,
        // A second signal ends the process without waiting for a slow disk.
        second = signals.insisted() => std::process::exit(second.exit_status().into()),
    };
    ended?;
    unmounted?;
    Ok(Outcome::Success)
}

/// Runs blocking work on a separate thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CommandError> + Send + 'static,
) -> Result<T, CommandError> {
    tasks::spawn_blocking(work).await.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => Err(CommandError::new(format!("the mount was cancelled: {error}"))),
    })
}

/// Opens the disks and mounts them.
fn start(args: &MountArgs) -> Result<Mounted, CommandError> {
    let context = Shown::new(Visibility::Never).context();
    let words: Vec<&OsStr> = args.sources.iter().map(OsString::as_os_str).collect();
    let locations = location::parse_all(&words, &args.server, &args.trust)?;
    let mut sources = Vec::new();
    for location in &locations {
        sources.push(open(location, args, &context)?);
    }
    let mut options = MountOptions::default();
    options.files = args.files;
    Ok(mount(sources, &args.directory, &options, &context)?)
}

fn open(
    location: &ImageLocation,
    args: &MountArgs,
    context: &JobContext,
) -> Result<MountSource, CommandError> {
    let mut options = args.share.apply(options(args.format, &args.trust));
    options = options.policy(args.trust.policy_with(&args.server));
    if let Some(snapshot) = &args.snapshot {
        options = options.snapshot(snapshot);
    }
    if args.writable {
        options = options.access(Access::ReadWrite);
    }
    let image = location.open(&options, &args.server.remotes()).map_err(advise_sharing)?;
    report_thaw(&image, &*context.observer);
    let name = location.name();
    // The last part of a path, or of the name of an export.
    let last = Path::new(&name).file_name().map(|last| last.to_string_lossy().into_owned());
    Ok(MountSource::new(last.unwrap_or(name), image))
}

/// Prints the paths of disks and partitions. A closed standard output is not an error.
fn announce(mounted: &Mounted) -> Result<(), CommandError> {
    let mut output = Output::new();
    let lines = mounted.parts().iter();
    let mut lines = lines.map(|part| output.line(&part.to_string_lossy()));
    let written = lines.try_for_each(|line| line);
    drop(lines);
    unless_closed(written.and_then(|()| output.finish()))
}
