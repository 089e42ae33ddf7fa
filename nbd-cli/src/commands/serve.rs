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
pub use crate::serving::{BitmapDurability, DetectZeroes, Discard};
use crate::serving::{PidFile, PrivateDirectory, drain, runtime, serve_error, serve_until_signal};
use crate::signals::{EndSignals, Hangup};
use crate::size::{ByteSize, parse_busy_poll, parse_duration, parse_limit};

const AFTER_HELP: &str = "\
Sources:
  disk.img         a raw image file
  /dev/vg/lv       a block device
  memory:1G        a disk in memory that is gone when the server ends
  nbd://host/name  an export of another server (any NBD URI, nbd:HOST:PORT, nbd:unix:PATH); of a raw
                   one --allocation-depth and --bitmap offer what that server knows
  NAME=SOURCE      any of these under an export name (write ./a=b for a file whose name has a '=')
  The first source is the default export: clients that give no name get it.

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
nothing is printed, and the command finds in its environment: uri, exportname, and unixsocket or
port. Sockets that a service manager hands over (LISTEN_FDS) are used by themselves.

SIGINT, SIGTERM and SIGQUIT finish what is in flight, flush, and end with 0; a second one ends at
once. SIGHUP reads TLS credentials again and never ends the server, unless its terminal is gone. A
socket file that nobody listens on any more is replaced.

Exit codes: 0 ended by a signal, 1 error, 128 + N ended by a second signal N; with --run the
command's status.";

/// Arguments of `nbd-cli serve`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ServeArgs {
    /// What to export; see below.
    #[arg(required_unless_present = "control", value_name = "SOURCE")]
    pub sources: Vec<OsString>,

    /// Listen on a TCP address; port 10809 unless given, any free one for 0. A port alone is one of
    /// 127.0.0.1. May be repeated. Without --listen, --socket or --run: 127.0.0.1.
    #[arg(short, long, value_name = "[ADDR][:PORT]")]
    pub listen: Vec<TcpAddress>,

    /// The port of other servers' command lines; refused, with the option to use.
    #[arg(long, hide = true, value_name = "PORT", value_parser = there_is_no_port)]
    pub port: Option<String>,

    /// Listen on a unix socket. May be repeated.
    #[arg(short = 'U', long, value_name = "PATH")]
    pub socket: Vec<PathBuf>,

    /// Name of the export, for the one source that has no name yet.
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

    /// Export this internal snapshot of a qcow2 image, given by name or id, for reading only unless
    /// --temporary is given.
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,

    /// Keep everything that is written in a temporary file, removed when the server ends; the image
    /// is only read. That file is in TMPDIR, or else in /var/tmp.
    #[arg(long, conflicts_with = "read_only")]
    pub temporary: bool,

    /// Serve images while other programs write to them. What clients read can then be a mix of old
    /// and new.
    #[arg(long, requires = "read_only")]
    pub force_share: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub trust: TrustArgs,

    /// What to do with space that clients discard.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    pub discard: Discard,

    /// What to do with written data that is all zero.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    pub detect_zeroes: DetectZeroes,

    /// Tell clients that the disk is a spinning one (NBD_FLAG_ROTATIONAL), for which they may
    /// schedule requests differently. By default nothing is said about the medium.
    #[arg(long)]
    pub rotational: bool,

    /// Offer the metadata context qemu:allocation-depth for images.
    #[arg(short = 'A', long)]
    pub allocation_depth: bool,

    /// What dirty bitmaps of the images survive. For all but 'none' a file IMAGE.dirty is kept
    /// beside an image from its first change on; it is removed when the server ends in order. If
    /// that file cannot be made an image is refused; without this option there is a warning
    /// [default: power].
    #[arg(long, value_enum, value_name = "WHAT")]
    pub bitmap_durability: Option<BitmapDurability>,

    /// Offer the metadata context qemu:dirty-bitmap:NAME for this bitmap, which every image must
    /// have, itself or in its backing files. May be repeated; 'all' for all that they have.
    /// Enabled bitmaps continue to record changes.
    #[arg(short = 'B', long, value_name = "NAME")]
    pub bitmap: Vec<String>,

    /// Do not show the exports to clients that ask for a list.
    #[arg(long)]
    pub hidden: bool,

    /// Listen on a control socket, with which exports, bitmaps and checkpoints are managed while
    /// the server runs; only this user can use it. See `nbd-cli control --help`.
    #[arg(long, value_name = "PATH", conflicts_with = "run")]
    pub control: Option<PathBuf>,

    /// Serve in the background: return when clients can connect, after the URIs are printed. The
    /// log goes nowhere unless -v is given.
    #[arg(long, conflicts_with = "run")]
    pub fork: bool,

    /// Write the process id of the server to this file, and hold a lock on it while serving. The
    /// file stays.
    #[arg(long, value_name = "PATH", conflicts_with = "run")]
    pub pid_file: Option<PathBuf>,

    /// Which process this is with --fork.
    #[arg(skip)]
    pub role: Role,

    /// Whether the log was asked for.
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

    /// Connections at a time; further ones are refused.
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Limits")]
    pub max_connections: usize,

    /// How long a client may take to choose an export: seconds, or 500ms, 2m.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration,
          help_heading = "Limits")]
    pub handshake_timeout: Duration,

    /// How long a client may stop in the middle of a request or leave its replies unread before
    /// it is closed; 0 for ever. Clients that are idle or slow are never closed.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_limit,
          help_heading = "Limits")]
    pub stall_timeout: Duration,

    /// How long clients may take to fetch the last replies when the server ends.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration,
          help_heading = "Limits")]
    pub drain_timeout: Duration,

    /// Slow requests of one connection that are carried out at a time.
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Limits")]
    pub max_requests: usize,

    /// How long to look for a client's next request before going to sleep, at most 1ms; 0 saves
    /// CPU time where clients with one request in flight may wait longer.
    #[arg(long, value_name = "TIME", default_value = "33us", help_heading = "Limits",
          value_parser = parse_busy_poll)]
    pub busy_poll: Duration,

    /// The same in nanoseconds, as QEMU calls it and earlier versions did.
    #[arg(long, value_name = "N", hide = true, overrides_with = "busy_poll",
          value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub poll_max_ns: Option<u32>,

    /// Memory for the requests of one connection.
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "64M",
        help_heading = "Limits",
        alias = "connection-budget"
    )]
    pub connection_memory_limit: ByteSize,

    /// Memory for the large requests of all connections.
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
    // Behind the directory, so that its socket is removed before it in any case.
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

/// Opens all sources, on a thread of its own: a layer on another server is waited for.
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
    // The socket's file is gone before the last word is said about the disks.
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
    config.connection_memory_limit =
        bytes("--connection-memory-limit", args.connection_memory_limit)?;
    config.memory_limit = bytes("--memory-limit", args.memory_limit)?;
    config.tls = tls.clone();
    Ok(config)
}

/// Where to listen: as told, else in private for a command, else on the loopback interface.
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

/// Says that clients can connect: by the file with the process id, by the addresses, and to a
/// parent that waits.
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

/// Where an export can be reached; unix sockets first.
fn uris(bound: &[BoundAddress], name: &str, tls: &TlsMode) -> Vec<String> {
    let (unix, other): (Vec<_>, Vec<_>) =
        bound.iter().partition(|address| matches!(address, BoundAddress::Unix(_)));
    let uri = |address: &BoundAddress| tls::uri(address, name, tls).to_string();
    unix.into_iter().chain(other).map(uri).collect()
}
