//! `nbd-cli backup`: full and incremental backups of a served disk into a chain of qcow2 files.

mod below;
mod chain;
mod checkpoint;
mod partial;
mod places;
mod report;

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use imgfmt::{Access, BackupIdentity, Uuid};
use nbd_client::{Client, ZeroMode};
use nbd_jobs::copy::destination::{Destination, Surface};
use nbd_jobs::copy::dirty::DirtyExtents;
use nbd_jobs::copy::engine;
use nbd_jobs::copy::job::{Job, Settings, ZeroPolicy};
use nbd_jobs::copy::plan::Extents;
use nbd_jobs::copy::source::Source;
use nbd_jobs::copy::verify::Verification;
use nbd_proto::NbdUri;
use nbd_proto::wire::{MetaContextName, TransmissionFlags};

use self::chain::Base;
use self::checkpoint::checkpointed;
use self::partial::{Partial, State};
use self::report::Report;
use super::image::open::TrustArgs;
use crate::connect::{ConnectionArgs, TlsArgs, connect};
use crate::error::{CommandError, Outcome, block_on, runtime};
use crate::locking::ShareArgs;
use crate::output::{ReportFormat, printable, warn};
use crate::progress::Visibility;
use crate::shown::Shown;
use crate::signals::{self, EndSignals, Hangup};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli backup nbd://vmhost/disk sunday.qcow2
  nbd-cli backup --bitmap daily --base sunday.qcow2 nbd://vmhost/disk monday.qcow2
  nbd-cli backup --control /run/nbd.control --export vm --bitmap daily sunday.qcow2
  nbd-cli backup --control /run/nbd.control --export vm --bitmap daily --base sunday.qcow2 monday.qcow2
  nbd-cli restore monday.qcow2 disk.img

A full backup is a qcow2 file that stands alone. An incremental one holds what is dirty in a bitmap
of the server (context qemu:dirty-bitmap:NAME), and its backing file is the backup before it. Whoever
runs the server starts the bitmap when a backup is taken and clears it when the next one is complete;
the disk should not change while it is copied. All files of a chain may be moved together.

Every backup says in its file which one it is. A base is refused that is known to be, or may be, another one than that after
which the bitmap began: one that was changed, cut off or converted, is of another disk, or has a later
backup upon it. With --control the image of the disk knows; without, only the files do.

With --control all of that happens by itself: the disk is copied as it was at one moment while clients
go on writing, the bitmap is begun anew at that moment, and if the backup fails nothing is forgotten.
Such a backup is not resumed: what there is of it is of a moment that is gone. However it ends,
SIGKILL included, its checkpoint ends with it.

While a backup runs it is TARGET.partial, and TARGET.partial.json says how far it is; when it is
complete it gets its name in one step. After an interruption --resume goes on where it ended: only
right if the disk has not changed since. On a block device what was there is lost at once; the device
is marked as incomplete until the backup is, and a backup there cannot be resumed. Other programs can
change a device without a trace: as the base of another backup it needs --trust-base.";

/// Size of the clusters of a backup, in bytes.
const CLUSTER_SIZE: u64 = 64 << 10;
/// Size of a request, in bytes.
const REQUEST_SIZE: u64 = 512 << 10;
/// How often the progress of a backup is made durable.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// Arguments of `nbd-cli backup`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(override_usage = "nbd-cli backup [OPTIONS] <SOURCE> <TARGET>\n       \
                            nbd-cli backup [OPTIONS] --control <PATH> --export <NAME> [SOURCE] <TARGET>")]
pub struct BackupArgs {
    /// The disk, as an NBD URI. With --control it need not be given: the server says where it is.
    // Clap does not take options between an optional argument and a required one behind it: if only
    // one is given it is the target.
    #[arg(value_name = "SOURCE")]
    pub first_place: OsString,

    /// The new qcow2 file, or a block device to overwrite.
    #[arg(value_name = "TARGET")]
    pub second_place: Option<OsString>,

    #[arg(skip)]
    source: Option<NbdUri>,

    #[arg(skip)]
    target: PathBuf,

    /// Copy only what is dirty in this bitmap of the server.
    /// With --control and without --base a full backup is made, and the bitmap begins there.
    #[arg(short = 'B', long, value_name = "NAME")]
    pub bitmap: Option<String>,

    /// The backup before this one: what is not dirty is taken from it.
    #[arg(short, long, value_name = "FILE", requires = "bitmap")]
    pub base: Option<PathBuf>,

    /// Take the base as right where that cannot be known: it carries no identity (an older version
    /// made it, or it was converted), was changed since, or the server does not say after which
    /// backup the bitmap began. A base that is known to be wrong is refused all the same.
    #[arg(long, requires = "base")]
    pub trust_base: bool,

    /// Make a checkpoint of a disk that clients go on writing to, through the control socket of its
    /// server, and copy from there.
    #[arg(long, value_name = "PATH", requires = "export")]
    pub control: Option<PathBuf>,

    /// Name of the disk's export, with --control.
    #[arg(long, value_name = "NAME", requires = "control")]
    pub export: Option<String>,

    /// Continue an interrupted backup. The disk must be as it was then.
    #[arg(long, conflicts_with = "control")]
    pub resume: bool,

    /// Discard an interrupted backup and begin again.
    #[arg(long, conflicts_with = "resume")]
    pub restart: bool,

    /// Read both sides again at the end and compare checksums: of what was copied, or of the whole
    /// disk.
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true,
          default_missing_value = "copied")]
    pub verify: Option<Verify>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub connection: ConnectionArgs,

    /// Requests in flight.
    #[arg(short = 'R', long, value_name = "N", default_value = "32")]
    pub requests: NonZeroUsize,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    /// Which files the images may name.
    #[command(flatten)]
    pub trust: TrustArgs,

    /// Print the summary as JSON.
    #[arg(long)]
    pub json: bool,

    /// Show progress even if standard error is not a terminal.
    #[arg(short, long)]
    pub progress: bool,

    /// Show no progress and no summary.
    #[arg(short, long, conflicts_with_all = ["progress", "json"])]
    pub quiet: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub tls: TlsArgs,
}

/// What is compared at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// What this backup has copied.
    Copied,
    /// The whole disk, which also tells whether the base and the bitmap belong together.
    All,
}

pub(crate) fn run(mut args: BackupArgs) -> Result<Outcome, CommandError> {
    args.tell_places()?;
    let args = &args;
    if args.requests.get() > 4096 || args.connection.connections.get() > 256 {
        return Err(CommandError::new(
            "--requests is limited to 4096 and --connections to 256; give smaller numbers",
        ));
    }
    if args.control.is_none() || args.source.is_some() {
        args.tls.check(&args.source)?;
    }
    if args.control.is_none() && args.bitmap.is_some() && args.base.is_none() {
        return Err(CommandError::new(
            "--bitmap needs --base FILE, the backup before this one; a full backup takes neither",
        ));
    }
    refuse_existing(args)?;
    let base = args.base.as_deref().map(|path| Base::open(path, args)).transpose()?;
    let base = base.as_ref();
    let report = match (&args.control, &args.source) {
        (Some(socket), _) => {
            let runtime = runtime()?;
            // Before there is a checkpoint: if a signal ended this process it would stay, and go on
            // to cost room and time.
            let signals = runtime.block_on(async { EndSignals::new(Hangup::Ends) })?;
            checkpointed(args, socket, base, |uri, issued| {
                runtime.block_on(until_signal(args, uri, base, issued, signals))
            })?
        }
        (None, Some(uri)) => {
            signals::watch()?;
            block_on(backup(args, uri, base, Issued::ours()?))?
        }
        (None, None) => return Err(CommandError::new("give the disk's URI, or --control")),
    };
    if !args.quiet {
        report.print(ReportFormat::from_json_flag(args.json))?;
    }
    Ok(Outcome::Success)
}

/// As [`backup`], given up when a signal comes. A second one ends the process at once.
async fn until_signal(
    args: &BackupArgs,
    uri: &NbdUri,
    base: Option<&Base>,
    issued: Issued,
    mut signals: EndSignals,
) -> Result<Report, CommandError> {
    let signal = tokio::select! {
        result = backup(args, uri, base, issued) => return result,
        signal = signals.next() => signal,
    };
    tokio::spawn(async move {
        let second = signals.insisted().await;
        std::process::exit(second.exit_status().into());
    });
    let ended = format!("signal {} has ended the backup of {uri}", signal.number());
    Err(match args.is_on_device() {
        true => partial::lost(&args.target, &CommandError::new(ended)),
        false => CommandError::new(format!("{ended}; begin again with --restart")),
    })
}

/// Who the backup and its disk are.
#[derive(Clone, Copy, Debug)]
struct Issued {
    backup: Uuid,
    disk: Option<Uuid>,
}

impl Issued {
    /// Where nobody else says it.
    fn ours() -> Result<Self, CommandError> {
        let backup = Uuid::random().map_err(|error| {
            CommandError::new(format!("the system gives no random numbers: {error}"))
        })?;
        Ok(Self { backup, disk: None })
    }
}

fn refuse_existing(args: &BackupArgs) -> Result<(), CommandError> {
    if args.is_on_device() {
        return match args.resume {
            true => Err(CommandError::new(format!(
                "cannot resume: what is on the block device '{}' does not say how far it is; leave out \
                 --resume",
                args.target.display()
            ))),
            false => Ok(()),
        };
    }
    match args.target.symlink_metadata() {
        Ok(_) => Err(CommandError::new(format!(
            "'{}' exists already; every backup needs a file of its own",
            args.target.display()
        ))),
        Err(_) => Ok(()),
    }
}

async fn backup(
    args: &BackupArgs,
    uri: &NbdUri,
    base: Option<&Base>,
    issued: Issued,
) -> Result<Report, CommandError> {
    let started = Instant::now();
    // Without a base everything is copied, whatever the bitmap says.
    let bitmap = args.base.as_ref().and(args.bitmap.as_deref()).map(context_of).transpose()?;
    let client = connect_to_disk(args, uri, bitmap.as_ref()).await?;
    let size = client.info().size;
    base.map_or(Ok(()), |base| base.check(size, args))?;
    let state = State::new(args, uri, size, base);
    let mut partial = Partial::begin(args, state, base)?;
    let disk = (client.clone(), uri);
    let result = fill(args, disk, bitmap.as_ref(), &mut partial).await;
    let (counts, resumed_at) = result.map_err(|error| {
        let error = CommandError::new(format!("the backup of {uri} failed: {error}"));
        partial.failed(
            &error,
            match args.control {
                None => "add --resume to go on, if the disk does not change",
                Some(_) => "begin again with --restart",
            },
        )
    })?;
    let verified = match args.verify {
        None => None,
        Some(what) => Some(verify(args, (&client, uri), bitmap.as_ref(), what, &partial).await?),
    };
    let mut identity = BackupIdentity::new(issued.backup, size);
    identity.base = base.map(Base::identity).unwrap_or_default();
    identity.disk = issued.disk;
    identity.bitmap.clone_from(&args.bitmap);
    identity.export = args.export.clone().unwrap_or_else(|| uri.export_name.clone());
    partial.complete(&identity, &args.trust)?;
    // Everything was read; how the connection ends does not matter.
    let _ = client.disconnect().await;
    Ok(Report::new(args, uri, size, counts, resumed_at, verified, started.elapsed()))
}

fn context_of(bitmap: &str) -> Result<MetaContextName, CommandError> {
    MetaContextName::qemu_dirty_bitmap(bitmap).map_err(|error| {
        CommandError::new(format!(
            "'{}' is not a valid name of a bitmap: {error}",
            printable(bitmap)
        ))
    })
}

async fn connect_to_disk(
    args: &BackupArgs,
    uri: &NbdUri,
    bitmap: Option<&MetaContextName>,
) -> Result<Client, CommandError> {
    let contexts = [MetaContextName::base_allocation()].into_iter().chain(bitmap.cloned());
    let connector = args.connection.options(&args.tls).connector(uri).meta_contexts(contexts);
    let client = connect(&connector, uri).await?;
    if let (Some(context), Some(name)) = (bitmap, &args.bitmap)
        && !client.meta_contexts().contains(context)
    {
        let offered = connector.list_meta_contexts(&["qemu:dirty-bitmap:".to_owned()]).await;
        let offered = offered.unwrap_or_default();
        let names: Vec<_> = offered
            .iter()
            .filter_map(MetaContextName::dirty_bitmap)
            .take(8)
            .map(|name| format!("'{}'", printable(name)))
            .collect();
        let has = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(CommandError::new(format!(
            "{uri} offers no dirty bitmap '{}' (it offers {has}); make a full backup, or have the \
             server export the bitmap",
            printable(name)
        )));
    }
    if !client.info().flags.contains(TransmissionFlags::READ_ONLY) {
        warn(&format!(
            "{uri} can be written to: if that happens while it is copied, the backup is a mix of \
             old and new"
        ));
    }
    Ok(client)
}

/// Copies into the partial file; returns what was copied how, in bytes, and where it began.
async fn fill(
    args: &BackupArgs,
    (client, uri): (Client, &NbdUri),
    bitmap: Option<&MetaContextName>,
    partial: &mut Partial,
) -> Result<([u64; 3], u64), CommandError> {
    let start = partial.done();
    let source = Source::Nbd { client: client.clone(), uri: uri.clone() };
    let extents = extents(&client, bitmap, start);
    let surface =
        if args.base.is_some() || start > 0 { Surface::Something } else { Surface::Zeroes };
    let image = partial.open(&args.trust, Access::ReadWrite)?;
    let destination = Destination::image(image, surface);
    let zeroes = match surface {
        Surface::Zeroes => ZeroPolicy::Skip,
        // Zero clusters: holes would show what is below.
        Surface::Something => ZeroPolicy::Write(ZeroMode::MayPunch),
    };
    let settings = Settings {
        requests: args.requests.get(),
        request_size: REQUEST_SIZE,
        unit: CLUSTER_SIZE.max(source.alignment()),
        zeroes,
        sparse: Some(CLUSTER_SIZE),
        start,
    };
    let shown = Shown::new(visibility(args));
    let job = Job::new(&settings, source, destination, extents, &shown.context());
    let job = Arc::new(job);
    let result = run_and_save(&job, partial).await;
    shown.clear();
    // Saves what is done in any case; the first error is the one to tell.
    let saved = save(&job, partial).await;
    result.and(saved)?;
    let counts = job.counts();
    let counts = [&counts.data, &counts.zero, &counts.unchanged].map(|n| n.load(Ordering::Relaxed));
    let job = Arc::into_inner(job)
        .ok_or_else(|| CommandError::new("a task of the backup has not ended"))?;
    job.destination.close_image()?;
    Ok((counts, start))
}

fn extents(client: &Client, bitmap: Option<&MetaContextName>, start: u64) -> Extents {
    let allocation = MetaContextName::base_allocation();
    match bitmap {
        Some(bitmap) => Extents::Dirty(Box::new(DirtyExtents::new(client.clone(), bitmap, start))),
        None if client.meta_contexts().contains(&allocation) => {
            Extents::Server(client.extents(&allocation, start..client.info().size))
        }
        None => Extents::Unknown,
    }
}

async fn run_and_save(job: &Arc<Job>, partial: &mut Partial) -> Result<(), CommandError> {
    let mut running = std::pin::pin!(engine::run(job));
    loop {
        tokio::select! {
            result = &mut running => return Ok(result?),
            () = tokio::time::sleep(SAVE_INTERVAL) => save(job, partial).await?,
        }
    }
}

/// Makes durable how far the backup is: first the data, then the word of it.
async fn save(job: &Job, partial: &mut Partial) -> Result<(), CommandError> {
    let done = job.done().await;
    job.destination.finish(true).await?;
    partial.save(done)
}

async fn verify(
    args: &BackupArgs,
    (client, uri): (&Client, &NbdUri),
    bitmap: Option<&MetaContextName>,
    what: Verify,
    partial: &Partial,
) -> Result<u64, CommandError> {
    let image = partial.open(&args.trust, Access::ReadOnly)?;
    let source = Source::Nbd { client: client.clone(), uri: uri.clone() };
    let unit = source.alignment();
    let extents = match what {
        Verify::Copied => extents(client, bitmap, 0),
        Verify::All => extents(client, None, 0),
    };
    let shown = Shown::new(visibility(args));
    let copy = Source::image(Arc::new(image));
    let verification = Verification::new(source, copy, unit, extents, &shown.context());
    let verification = Arc::new(verification);
    let result = verification.run(args.requests.get()).await;
    shown.clear();
    result.map_err(|error| {
        let error = CommandError::new(format!("the backup is not as it should be: {error}"));
        partial.failed(&error, "begin again with --restart")
    })
}

fn visibility(args: &BackupArgs) -> Visibility {
    match (args.progress, args.quiet) {
        (true, _) => Visibility::Always,
        (_, true) => Visibility::Never,
        _ => Visibility::IfTerminal,
    }
}
