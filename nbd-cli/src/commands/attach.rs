//! `nbd-cli attach`: give a disk a kernel device (`/dev/nbdX`).

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use imgfmt::Format;
use nbd_client::{ReplyMode, TransmissionFlags};
use nbd_jobs::devices::{
    AttachOptions, Attached, Backend, ensure_driver, parse_device, waits_for_adoption,
};
use nbd_jobs::object::ObjectUrl;
use nbd_jobs::qemu_name;
use nbd_jobs::serving::{ServeOptions, Writes, is_memory, source_uri};
use nbd_jobs::size::{ByteSize, parse_duration};
use nbd_jobs::tasks;
use nbd_proto::NbdUri;
use nbd_server::ServerConfig;
use nbd_server::export::Export;

use super::image::open::TrustArgs;
use crate::connect::{ServerArgs, TlsArgs, explain_unknown_export};
use crate::error::{CommandError, Outcome};
use crate::image_format::ImageFormat;
use crate::locking::ShareArgs;
use crate::logging;
use crate::serving::background::{self, Role};
use crate::serving::{
    Aio, CacheMode, FilterArgs, PidFile, keep_device, runtime, serve_options, service_manager,
};
use crate::signals::{EndSignals, Hangup};

/// Time to wait for the image of a killed process: the kernel may release it only when the last
/// requests of the process have ended.
const RELEASE: Duration = Duration::from_secs(30);

const AFTER_HELP: &str = "\
Examples:
  nbd-cli attach nbd://localhost/disk             prints /dev/nbd0
  nbd-cli attach disk.qcow2 /dev/nbd3             an image, served by this program
  nbd-cli attach nbds://host/disk                 with TLS, through this program
  nbd-cli attach --foreground nbd://host/disk /dev/nbd0      as a service

The command returns when the device can be used. A process remains in the background: it restores
lost connections, and serves images and servers with TLS. `nbd-cli detach` ends it. If it ends in
another way, the device waits: attaching the same source to the same device adopts it, as a service
that is started again does. SIGTERM detaches the device, unless it is in use.

Data that was written but not flushed is lost if the server loses it, as on a disk without power.";

/// Arguments of `nbd-cli attach`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct AttachArgs {
    /// An NBD URI, an image, a block device, memory:SIZE, or, with --read-only or --temporary, an
    /// object of a store or a backup in a repository.
    pub source: OsString,

    /// The device, such as /dev/nbd0 [default: a free one]. If the same source is attached to it,
    /// the device is adopted.
    #[arg(value_parser = parse_device)]
    pub device: Option<u32>,

    /// Connections of the device, if the server allows several. With more than one, a request that
    /// takes longer than --timeout, or 30 seconds, is sent again over another connection.
    #[arg(short = 'C', long, value_name = "N", default_value = "1")]
    pub connections: NonZeroUsize,

    /// Refuse all writes.
    #[arg(short, long)]
    pub read_only: bool,

    /// Size of the device's logical blocks in bytes, a power of two from 512 to 4096 [default: the
    /// server's minimum].
    #[arg(long, value_name = "SIZE")]
    pub block_size: Option<ByteSize>,

    /// Time after which an unanswered request is sent again over another or a new connection, in
    /// whole seconds or 2m. By default there is no limit for a slow server, and requests that a
    /// lost connection left unanswered are sent again after at most 30 seconds.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// Time for which requests wait when all connections are lost; then they fail. Connections are
    /// restored after that, too.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration)]
    pub reconnect: Duration,

    /// Stay in the foreground: for service managers, which are told when the device can be used.
    #[arg(long)]
    pub foreground: bool,

    /// Write the id of the process that keeps the device to this file.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub image: ImageArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub tls: TlsArgs,

    /// The role of this process, which the program sets itself.
    #[arg(skip)]
    pub role: Role,

    /// Whether standard error is kept for the log.
    #[arg(skip)]
    pub keeps_log: bool,
}

/// Options of images.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Images")]
pub struct ImageArgs {
    /// Format of the image; detected unless given.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    /// Attach this internal snapshot of a qcow2 image, given by name or id, read-only unless
    /// --temporary is given.
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,

    /// Keep all writes in a temporary file that is removed when the device is detached; the image
    /// is only read.
    #[arg(long, conflicts_with = "read_only")]
    pub temporary: bool,

    /// Read the image while other programs write to it. The device may then show a mix of old and
    /// new data.
    #[arg(long, requires = "read_only")]
    pub force_share: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub trust: TrustArgs,

    /// The use of the page cache for images, and when writes are durable. Another process can adopt
    /// the device only with writethrough and directsync: with the other modes, the end of this
    /// process may lose writes that the kernel counts as written.
    #[arg(long, value_enum, default_value = "writethrough", value_name = "MODE")]
    pub cache: CacheMode,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub filter: FilterArgs,
}

pub(crate) fn run(args: &AttachArgs) -> Result<Outcome, CommandError> {
    if args.role == Role::Background {
        background::leave_session();
    }
    tasks::block_on(&runtime()?, attach(args))
}

async fn attach(args: &AttachArgs) -> Result<Outcome, CommandError> {
    let mut signals = EndSignals::new(Hangup::EndsWithTerminal)?;
    let uri = source_uri(&args.source).transpose()?;
    args.tls.check(uri.as_ref())?;
    // Checked before anything is opened or a server is contacted.
    ensure_driver()?;
    PidFile::write_and_keep(args.pid_file.as_deref())?;
    let options = options(args, uri.as_ref())?;
    let attached = signals.meanwhile(connected(args, uri, &options)).await?;
    announce(&attached);
    if args.role == Role::Background {
        background::ready(args.keeps_log)?;
    }
    logging::include_warnings();
    service_manager::ready();
    keep_device(attached, &mut signals).await?;
    Ok(Outcome::Success)
}

/// The name of the device. A closed standard output is not an error.
fn announce(attached: &Attached) {
    let (device, connections) = (attached.path(), attached.connections());
    let is_adopted = attached.is_adopted();
    tracing::info!(device = %device.display(), connections, is_adopted, "attached");
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{}", device.display()).and_then(|()| stdout.flush());
}

fn options(args: &AttachArgs, uri: Option<&NbdUri>) -> Result<AttachOptions, CommandError> {
    let mut options = AttachOptions::new(identifier(args, uri)?);
    options.device = args.device;
    options.connections = args.connections;
    options.read_only = args.read_only;
    options.block_size = args.block_size.map(ByteSize::bytes);
    options.timeout = args.timeout;
    options.reconnect = args.reconnect;
    Ok(options)
}

/// Returns the text by which the device is recognised when it is adopted. A disk whose state ends
/// with this process must not be adopted, so its text is unique.
fn identifier(args: &AttachArgs, uri: Option<&NbdUri>) -> Result<String, CommandError> {
    let mut text = match uri {
        Some(uri) => uri.to_string(),
        None if is_memory(&args.source) || is_object(&args.source) => {
            args.source.to_string_lossy().into_owned()
        }
        None => {
            let path = qemu_name::path_in(&args.source);
            let found = std::fs::canonicalize(path).and_then(|path| {
                let metadata = std::fs::metadata(&path)?;
                Ok((path, metadata))
            });
            let (path, metadata) = found.map_err(|error| {
                CommandError::new(format!("cannot open '{}': {error}", path.display()))
            })?;
            // Another file under this name, a copy of the same size, must not adopt the device.
            let (device, inode) = (metadata.dev(), metadata.ino());
            format!("{} (file {device}:{inode})", path.display())
        }
    };
    if let Some(snapshot) = &args.image.snapshot {
        text = format!("{text} (snapshot {snapshot})");
    }
    // Unflushed changes of a qcow2 image are lost with this process, and the kernel does not
    // notice: a later flush would succeed without them.
    let cache = imgfmt::CacheMode::from(args.image.cache);
    let loses_changes = uri.is_none() && !args.read_only && !cache.is_writethrough();
    // Under its name there may be another object later, or another backup.
    let is_unique = is_memory(&args.source) || is_object(&args.source) || args.image.temporary;
    if is_unique || loses_changes {
        text = format!("{text} (of process {} only)", std::process::id());
    }
    Ok(text)
}

fn is_object(source: &OsStr) -> bool {
    source.to_str().and_then(ObjectUrl::of).is_some()
}

/// Connects to the source or opens it, and attaches it.
async fn connected(
    args: &AttachArgs,
    uri: Option<NbdUri>,
    options: &AttachOptions,
) -> Result<Attached, CommandError> {
    let mut choices = choices(args);
    if uri.is_some() {
        // Raw, like the kernel, regardless of the first bytes of the disk.
        choices.format = choices.format.or(Some(Format::Raw));
    }
    if let Some(uri) = &uri
        && !args.image.needs_process()
    {
        let connector = args.tls.connector(uri).reply_mode(ReplyMode::Simple);
        let stream = match connector.connect_stream().await {
            Ok(stream) => stream,
            Err(error) => return Err(explain_unknown_export(&connector, uri, error).await),
        };
        let is_read_only = stream.info().flags.contains(TransmissionFlags::READ_ONLY);
        if let Some(backend) = Backend::of_server(stream) {
            return Ok(Attached::new(backend, options).await?);
        }
        if is_read_only {
            choices.writes = Writes::Refused;
        }
    }
    let export = opened(args.source.clone(), args.device, choices).await?;
    let mut config = ServerConfig::default();
    config.io_uring = Aio::default().may_use_io_uring();
    let backend = Backend::of_export(export, config).await?;
    Ok(Attached::new(backend, options).await?)
}

/// Opens the source as an export, on a separate thread: opening a layer on another server blocks.
async fn opened(
    source: OsString,
    device: Option<u32>,
    mut choices: ServeOptions,
) -> Result<Arc<dyn Export>, CommandError> {
    let opening = tasks::spawn_blocking(move || {
        if device.is_some_and(waits_for_adoption) {
            choices.patience = Some(RELEASE);
        }
        Ok(nbd_jobs::blockdev::open_source(&choices, &source)?)
    });
    let opened = opening.await.unwrap_or_else(|error| {
        Err(CommandError::new(format!("opening the image was cancelled: {error}")))
    });
    opened.map(|opened| opened.export)
}

fn choices(args: &AttachArgs) -> ServeOptions {
    let image = &args.image;
    let server = ServerArgs {
        reconnect: Some(args.reconnect),
        tls: args.tls.clone(),
        ..ServerArgs::default()
    };
    let mut options = serve_options(args.read_only, image.temporary);
    options.format = image.format.map(Format::from);
    options.snapshot = image.snapshot.clone();
    options.locking = ShareArgs { force_share: image.force_share }.locking(image.trust.locks);
    options.cache = image.cache.into();
    options.policy = image.trust.trust_image.then(|| image.trust.policy_with(&server));
    options.passphrases = image.trust.keys.passphrases();
    options.filter = image.filter.options();
    options.remotes = server.remotes();
    options
}

impl ImageArgs {
    /// Whether an option makes an export of another server a disk that this process has to serve.
    fn needs_process(&self) -> bool {
        self.format.is_some_and(|format| Format::from(format) != Format::Raw)
            || self.snapshot.is_some()
            || self.temporary
            || !self.filter.is_default()
    }
}
