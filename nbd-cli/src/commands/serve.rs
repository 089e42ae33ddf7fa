//! `nbd-cli serve`: export disk images, block devices and memory disks.

mod address;
mod captive;
mod control;
mod source;
mod tls;
mod upstream;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use nbd_server::tls::TlsMode;
use nbd_server::{BoundAddress, ExportRegistry, ListenAddress, Server, ServerConfig};

use self::address::TcpAddress;
use self::captive::Captive;
use self::control::{ControlSocket, Controller, Disks};
pub use self::tls::{TlsArgs, TlsChoice};
pub use self::upstream::UpstreamArgs;
use super::image::open::TrustArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::ImageFormat;
use crate::output::warn;
use crate::serving::background::{self, Role};
pub use crate::serving::{Aio, BitmapDurability, CacheMode, DetectZeroes, Discard};
use crate::serving::{PidFile, PrivateDirectory, drain, runtime, serve_error, serve_until_signal};
use crate::signals::{EndSignals, Hangup};
use crate::size::{ByteSize, parse_busy_poll, parse_duration, parse_limit};

const AFTER_HELP: &str = "\
Sources:
  disk.img         a raw image file
  /dev/vg/lv       a block device
  memory:1G        a disk in memory that is lost when the server ends
  nbd://host/name  an export of another server (any NBD URI, nbd:HOST:PORT, nbd:unix:PATH); of a raw
                   one, --allocation-depth and --bitmap offer that server's contexts
  NAME=SOURCE      any of these under an export name (write ./a=b for a file whose name has a '=')
  The first source is the default export: clients that request no name get it.

Examples:
  nbd-cli serve memory:1G
  nbd-cli serve --read-only disk.img
  nbd-cli serve --snapshot monday disk.qcow2
  nbd-cli serve --bitmap monday disk.qcow2
  nbd-cli serve --temporary --run './try-something \"$uri\"' disk.qcow2
  nbd-cli serve --fork --pid-file /run/disk.pid --socket /run/disk.sock disk.img
  nbd-cli serve --socket /run/nbd.sock root=/srv/root.img data=/dev/vg/data
  nbd-cli serve --listen '[::1]:10810' --name disk --description 'the build disk' disk.img
  nbd-cli serve --listen 0.0.0.0 --tls-certificates /etc/pki/nbd disk.img
  nbd-cli serve --listen 0.0.0.0 --tls-psk /etc/nbd/keys.psk disk.img
  nbd-cli serve --run 'qemu-img info \"$uri\"' disk.img

When clients can connect, one URI per export and address is printed on standard output. With --run
nothing is printed, and the environment of the command contains uri, exportname, and unixsocket or
port. Sockets passed by a service manager (LISTEN_FDS) are used automatically.

On SIGINT, SIGTERM and SIGQUIT the server completes the requests in flight, flushes, and exits with
0; a second signal ends it at once. SIGHUP reloads TLS credentials and never ends the server, unless
its terminal is gone. A socket file without a listening process is replaced.

Exit codes: 0 ended by a signal, 1 error, 128 + N ended by a second signal N; with --run the
command's status.";

/// Arguments of `nbd-cli serve`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ServeArgs {
    /// The disks to export; see below.
    #[arg(required_unless_present = "control", value_name = "SOURCE")]
    pub sources: Vec<OsString>,

    /// Listen on a TCP address; the default port is 10809, and 0 selects a free one. A port alone
    /// is one of 127.0.0.1. May be repeated. Without --listen, --socket or --run: 127.0.0.1.
    #[arg(short, long, value_name = "[ADDR][:PORT]")]
    pub listen: Vec<TcpAddress>,

    /// The port option of other servers; refused, with the option to use.
    #[arg(long, hide = true, value_name = "PORT", value_parser = there_is_no_port)]
    pub port: Option<String>,

    /// Listen on a unix socket. May be repeated.
    #[arg(short = 'U', long, value_name = "PATH")]
    pub socket: Vec<PathBuf>,

    /// Name of the export, if exactly one source has no name.
    #[arg(short, long)]
    pub name: Option<String>,

    /// Description shown to clients, if there is only one source.
    #[arg(short = 'D', long, value_name = "TEXT")]
    pub description: Option<String>,

    /// Refuse all writes.
    #[arg(short, long)]
    pub read_only: bool,

    /// Format of the images; detected unless given. A raw image that was detected refuses writes
    /// that would make it look like another format.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    /// Export this internal snapshot of a qcow2 image, given by name or id, read-only unless
    /// --temporary is given.
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,

    /// Keep all writes in a temporary file that is removed when the server ends; the image is only
    /// read. The file is in TMPDIR or, by default, in /var/tmp.
    #[arg(long, conflicts_with = "read_only")]
    pub temporary: bool,

    /// Serve images while other programs write to them. Clients may then read a mix of old and new
    /// data.
    #[arg(long, requires = "read_only")]
    pub force_share: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub trust: TrustArgs,

    /// The use of the page cache for images and block devices, and when writes are durable.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub cache: CacheMode,

    /// How images are read that are not in memory.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub aio: Aio,

    /// The treatment of discarded space.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    pub discard: Discard,

    /// The treatment of writes whose data is all zero.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    pub detect_zeroes: DetectZeroes,

    /// Report the disk as rotational (NBD_FLAG_ROTATIONAL), for which clients may schedule requests
    /// differently. By default no medium is reported.
    #[arg(long)]
    pub rotational: bool,

    /// Offer the metadata context qemu:allocation-depth for images.
    #[arg(short = 'A', long)]
    pub allocation_depth: bool,

    /// The failure that the images' dirty bitmaps survive. Except for 'none', a file IMAGE.dirty is
    /// kept beside an image from its first change on; it is removed when the server ends cleanly.
    /// If that file cannot be created, the image is refused; without this option there is a warning
    /// [default: power].
    #[arg(long, value_enum, value_name = "WHAT")]
    pub bitmap_durability: Option<BitmapDurability>,

    /// Offer the metadata context qemu:dirty-bitmap:NAME for this bitmap, which every image must
    /// have, itself or in its backing files. May be repeated; 'all' for all bitmaps. Enabled
    /// bitmaps continue to record changes.
    #[arg(short = 'B', long, value_name = "NAME")]
    pub bitmap: Vec<String>,

    /// Hide the exports from clients that request a list.
    #[arg(long)]
    pub hidden: bool,

    /// Listen on a control socket, for managing exports, bitmaps and checkpoints while the server
    /// runs; only this user can use it. See `nbd-cli control --help`.
    #[arg(long, value_name = "PATH", conflicts_with = "run")]
    pub control: Option<PathBuf>,

    /// Serve in the background: return when clients can connect, after printing the URIs. The log
    /// is discarded unless -v is given.
    #[arg(long, conflicts_with = "run")]
    pub fork: bool,

    /// Write the process id of the server to this file, and keep it locked while serving. The file
    /// remains afterwards.
    #[arg(long, value_name = "PATH", conflicts_with = "run")]
    pub pid_file: Option<PathBuf>,

    /// The role of this process with --fork.
    #[arg(skip)]
    pub role: Role,

    /// Whether logging was requested.
    #[arg(skip)]
    pub keeps_log: bool,

    /// Run a shell command while serving, on a private unix socket unless an address is given, and
    /// exit with its status.
    #[arg(long, value_name = "COMMAND")]
    pub run: Option<String>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub tls: TlsArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub upstream: UpstreamArgs,

    /// Most connections at a time; further ones are refused.
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Limits")]
    pub max_connections: usize,

    /// Time limit for a client to select an export: seconds, or 500ms, 2m.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration,
          help_heading = "Limits")]
    pub handshake_timeout: Duration,

    /// Time after which a client is disconnected that stops in the middle of a request or leaves
    /// its replies unread; 0 for no limit. Idle and slow clients are never disconnected.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_limit,
          help_heading = "Limits")]
    pub stall_timeout: Duration,

    /// Time for clients to receive the last replies when the server ends.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration,
          help_heading = "Limits")]
    pub drain_timeout: Duration,

    /// Most slow requests of one connection that are carried out at a time.
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Limits")]
    pub max_requests: usize,

    /// Time to poll for a client's next request before sleeping, at most 1ms; 0 saves CPU time, at
    /// the cost of latency for clients with one request in flight.
    #[arg(long, value_name = "TIME", default_value = "33us", help_heading = "Limits",
          value_parser = parse_busy_poll)]
    pub busy_poll: Duration,

    /// The same in nanoseconds: the name in QEMU and in earlier versions.
    #[arg(long, value_name = "N", hide = true, overrides_with = "busy_poll",
          value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub poll_max_ns: Option<u32>,

    /// Memory limit for the requests of one connection.
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "64M",
        help_heading = "Limits",
        alias = "connection-budget"
    )]
    pub connection_memory_limit: ByteSize,

    /// Memory limit for the large requests of all connections.
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "256M",
        help_heading = "Limits",
        alias = "memory"
    )]
    pub memory_limit: ByteSize,
}

/// Refuses `--port`.
fn there_is_no_port(port: &str) -> Result<String, String> {
    Err(format!("write --listen 127.0.0.1:{port}, or --listen 0.0.0.0:{port} for all addresses"))
}

pub(crate) fn run(args: ServeArgs) -> Result<Outcome, CommandError> {
    if args.role == Role::Background {
        background::leave_session();
    }
    if args.fork && service_manager_gave_sockets() {
        return Err(CommandError::new(
            "--fork is not possible with sockets of a service manager; leave it out",
        ));
    }
    runtime()?.block_on(serve(args))
}

async fn serve(args: ServeArgs) -> Result<Outcome, CommandError> {
    let mut signals = EndSignals::new(Hangup::EndsWithTerminal)?;
    let registry = ExportRegistry::new();
    let tls = args.tls.load()?;
    let args = Arc::new(args);
    let (names, disks) = signals.meanwhile(open_sources(&args, &registry)).await?;
    tls::reload_on_hangup(&tls)?;
    let private = match &args.run {
        Some(_) if args.listen.is_empty() && args.socket.is_empty() => {
            Some(PrivateDirectory::new()?)
        }
        _ => None,
    };
    // Declared after the directory, so that its socket is always removed first.
    let mut server = Server::new(config(&args, &tls)?, registry);
    let mut bound = Vec::new();
    for address in addresses(&args, private.as_ref()) {
        bound.extend(server.listen(&address).await.map_err(serve_error)?);
    }
    warn_of_exposure(&bound, &tls, if args.read_only { "" } else { " and change" });
    let control = match (&args.control, disks) {
        (Some(path), Some(disks)) => {
            let socket = ControlSocket::open(path).await?;
            let (bound, tls) = (bound.clone(), tls.clone());
            let uris = move |name: &str| uris(&bound, name, &tls);
            let choices = source::choices(&args);
            let controller = Controller::new(server.handle(), disks, choices, Box::new(uris));
            Some((socket, Arc::new(controller)))
        }
        _ => None,
    };
    match &args.run {
        None if control.is_some() => {
            let _pid_file = started(&args, || announce(&bound, &names, &tls))?;
            serve_controlled(server, signals, control).await
        }
        None => {
            let _pid_file = started(&args, || announce(&bound, &names, &tls))?;
            serve_until_signal(server, signals, std::future::pending()).await?;
            Ok(Outcome::Success)
        }
        Some(command) => {
            let captive = Captive::start(command, &bound, &names, &tls)?;
            serve_while_running(server, captive, &mut signals).await
        }
    }
}

/// Opens all sources, on a separate thread: opening a layer on another server blocks.
async fn open_sources(
    args: &Arc<ServeArgs>,
    registry: &ExportRegistry,
) -> Result<(Vec<String>, Option<Disks>), CommandError> {
    let (args, registry) = (Arc::clone(args), registry.clone());
    let opening = tokio::task::spawn_blocking(move || {
        let mut disks = args.control.as_ref().map(|_| Disks::default());
        source::add_all(&args, &registry, disks.as_mut()).map(|names| (names, disks))
    });
    opening.await.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => Err(CommandError::new(format!("opening the images was given up: {error}"))),
    })
}

async fn serve_controlled(
    server: Server,
    signals: EndSignals,
    control: Option<(ControlSocket, Arc<Controller>)>,
) -> Result<Outcome, CommandError> {
    let Some((socket, controller)) = control else { return Ok(Outcome::Success) };
    let listening = tokio::spawn(socket.serve(Arc::clone(&controller)));
    let served = serve_until_signal(server, signals, controller.stopped()).await;
    // The socket's file is removed before the disks are reported closed.
    listening.abort();
    let _ = listening.await;
    controller.end_all().await;
    served?;
    Ok(Outcome::Success)
}

async fn serve_while_running(
    server: Server,
    mut captive: Captive,
    signals: &mut EndSignals,
) -> Result<Outcome, CommandError> {
    let mut status = Ok(0);
    let ended = async {
        status = captive.wait(signals).await;
    };
    drain(server, ended).await?;
    Ok(Outcome::Status(status?))
}

fn warn_of_exposure(bound: &[BoundAddress], tls: &TlsMode, and_change: &str) {
    let Some(why) = tls::exposure(tls) else { return };
    for address in bound.iter().filter(|address| address.is_public()) {
        warn(&format!(
            "{address} can be reached by other machines, and anyone who can reach it can \
             read{and_change} the disk: {why}; use TLS with credentials, 127.0.0.1, --socket or a \
             firewall"
        ));
    }
}

fn config(args: &ServeArgs, tls: &TlsMode) -> Result<ServerConfig, CommandError> {
    for (option, value) in
        [("--max-connections", args.max_connections), ("--max-requests", args.max_requests)]
    {
        if value == 0 {
            return Err(CommandError::new(format!("{option} must be at least 1")));
        }
    }
    let bytes = |option: &str, size: ByteSize| {
        usize::try_from(size.bytes())
            .map_err(|_| CommandError::new(format!("{option} {size} is too large here")))
    };
    let mut config = ServerConfig::default();
    config.max_connections = args.max_connections;
    config.max_requests = args.max_requests;
    config.handshake_timeout = args.handshake_timeout;
    config.stall_timeout = (!args.stall_timeout.is_zero()).then_some(args.stall_timeout);
    config.drain_timeout = args.drain_timeout;
    config.busy_poll = match args.poll_max_ns {
        Some(nanoseconds) => Duration::from_nanos(nanoseconds.into()),
        None => args.busy_poll,
    };
    config.io_uring = args.aio.may_use_io_uring();
    config.connection_memory_limit =
        bytes("--connection-memory-limit", args.connection_memory_limit)?;
    config.memory_limit = bytes("--memory-limit", args.memory_limit)?;
    config.tls = tls.clone();
    Ok(config)
}

/// Returns the addresses to listen on: as given, else a private socket for a command, else the
/// loopback interface.
fn addresses(args: &ServeArgs, private: Option<&PrivateDirectory>) -> Vec<ListenAddress> {
    let tcp = args.listen.iter().map(|address| ListenAddress::Tcp(address.to_string()));
    let unix = args.socket.iter().cloned().map(ListenAddress::Unix);
    let mut addresses: Vec<_> = tcp.chain(unix).collect();
    if service_manager_gave_sockets() {
        addresses.push(ListenAddress::Systemd);
    } else if let Some(directory) = private {
        addresses.push(ListenAddress::Unix(directory.socket()));
    }
    if addresses.is_empty() {
        addresses.push(ListenAddress::Tcp(TcpAddress::default().to_string()));
    }
    addresses
}

fn service_manager_gave_sockets() -> bool {
    let own = std::process::id().to_string();
    std::env::var("LISTEN_PID").is_ok_and(|pid| pid.trim() == own)
        && std::env::var_os("LISTEN_FDS").is_some()
}

/// Reports that clients can connect: with the process id file, the printed addresses, and a
/// notification of a waiting parent.
fn started(args: &ServeArgs, announce: impl FnOnce()) -> Result<Option<PidFile>, CommandError> {
    let pid_file = args.pid_file.as_deref().map(PidFile::write).transpose()?;
    announce();
    if args.role == Role::Background {
        background::ready(args.keeps_log)?;
    }
    Ok(pid_file)
}

/// One URI per line. A closed standard output is not an error.
fn announce(bound: &[BoundAddress], names: &[String], tls: &TlsMode) {
    let mut stdout = std::io::stdout().lock();
    for address in bound {
        for name in names {
            let _ = writeln!(stdout, "{}", tls::uri(address, name, tls));
        }
    }
    let _ = stdout.flush();
}

/// Returns the URIs of an export; unix sockets first.
fn uris(bound: &[BoundAddress], name: &str, tls: &TlsMode) -> Vec<String> {
    let (unix, other): (Vec<_>, Vec<_>) =
        bound.iter().partition(|address| matches!(address, BoundAddress::Unix(_)));
    let uri = |address: &BoundAddress| tls::uri(address, name, tls).to_string();
    unix.into_iter().chain(other).map(uri).collect()
}
