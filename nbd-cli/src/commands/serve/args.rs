//! The arguments of `nbd-cli serve`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use nbd_jobs::monitor::MetricsAddress;
use nbd_jobs::size::{ByteSize, parse_busy_poll, parse_duration, parse_limit};
use nbd_server::ListenAddress;

use super::export::ExportArgs;
use super::socket_file::SocketFileArgs;
use super::tls::TlsArgs;
use crate::serving::Aio;
use crate::serving::background::Role;

const AFTER_HELP: &str = "\
Sources:
  disk.img         a raw image file
  /dev/vg/lv       a block device
  memory:1G        a disk in memory that is lost when the server ends
  nbd://host/name  an export of another server (any NBD URI, nbd:HOST:PORT, nbd:unix:PATH); of a raw
                   one, --allocation-depth and --bitmap offer that server's contexts
  json:OBJECT      a disk described by the options of QEMU's block drivers, such as
                   json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qcow2\"}}
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
  nbd-cli serve --metrics 9810 disk.img
  nbd-cli serve --run 'qemu-img info \"$uri\"' disk.img
  nbd-cli serve --config /etc/nbd-cli/server.toml
  nbd-cli serve --control /run/nbd.control --takeover /run/nbd.control -U /run/nbd.sock disk.img

When clients can connect, one URI per export and address is printed on standard output. With --run
nothing is printed, and the environment of the command contains uri, exportname, and unixsocket or
port. Sockets passed by a service manager (LISTEN_FDS) are used automatically.

On SIGINT, SIGTERM and SIGQUIT the server completes the requests in flight, flushes, and exits with
0; a second signal ends it at once. SIGHUP reloads TLS credentials and the file of --config and never
ends the server, unless its terminal is gone. A socket file without a listening process is replaced.

Exit codes: 0 ended by a signal, 1 error, 128 + N ended by a second signal N; with --run the
command's status.";

/// Arguments of `nbd-cli serve`.
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ServeArgs {
    /// The disks to export; see below.
    #[arg(required_unless_present_any = ["control", "config"], value_name = "SOURCE")]
    pub sources: Vec<OsString>,

    /// Serve the exports of a TOML file. At its top are the options of the server; each table
    /// 'export' has the 'source', the 'name' and the options of an export. Options have the names
    /// listed here. The file is read again on SIGHUP and by `nbd-cli control reload`.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sources", "name"])]
    pub config: Option<PathBuf>,

    /// Check the file of --config, and that everything it names can be opened, without serving or
    /// writing anything.
    #[arg(long, requires = "config", conflicts_with = "fork")]
    pub check: bool,

    /// Listen on a TCP address; the default port is 10809, and 0 selects a free one. A port alone
    /// is on 127.0.0.1. May be repeated. Without --listen, --socket or --run: 127.0.0.1.
    #[arg(short, long, value_name = "[ADDR][:PORT]", value_parser = tcp_address)]
    pub listen: Vec<ListenAddress>,

    /// The port option of other servers; refused, with the option to use.
    #[arg(long, hide = true, value_name = "PORT", value_parser = there_is_no_port)]
    pub port: Option<String>,

    /// Listen on a unix socket. May be repeated.
    #[arg(short = 'U', long, value_name = "PATH")]
    pub socket: Vec<PathBuf>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub sockets: SocketFileArgs,

    /// Name of the export, if exactly one source has no name.
    #[arg(short, long)]
    pub name: Option<String>,

    /// The way in which reads wait for a disk.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub aio: Aio,

    /// Serve metrics for Prometheus (/metrics), a status page (/) and /healthz over HTTP. A port
    /// alone is on 127.0.0.1. There is no password: every client sees the names of exports, the
    /// addresses of clients and where the disks are used, but never their content.
    #[arg(long, value_name = "[HOST:]PORT|unix:PATH")]
    pub metrics: Option<MetricsAddress>,

    /// Listen on a control socket, for managing exports, bitmaps and checkpoints while the server
    /// runs; only this user can use it. See `nbd-cli control --help`.
    #[arg(long, value_name = "PATH", conflicts_with = "run")]
    pub control: Option<PathBuf>,

    /// Take over from the running server with this control socket: its listening sockets, its
    /// clients and its images, with the sources and options given here. Clients notice a short
    /// pause; those with TLS are disconnected. If anything fails, that server continues.
    #[arg(long, value_name = "CONTROL", conflicts_with_all = ["check", "run"])]
    pub takeover: Option<PathBuf>,

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
    pub export: ExportArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub tls: TlsArgs,

    /// Most connections at a time; further ones are refused.
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Limits")]
    pub max_connections: usize,

    /// Time limit for a client to select an export: seconds, or 500ms, 2m.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration,
          help_heading = "Limits")]
    pub handshake_timeout: Duration,

    /// Time limit for opening sources with --check, at a reload (which then fails) and by `nbd-cli
    /// control add-export`; 0 for no limit. At a reload it also limits reading the file and
    /// removing each export. A start has no limit, because it may have to repair images.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_limit,
          help_heading = "Limits")]
    pub open_timeout: Duration,

    /// Time after which a client that stops in the middle of a request, or does not read its
    /// replies, is disconnected; 0 for no limit. Idle and slow clients are never disconnected.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_limit,
          help_heading = "Limits")]
    pub stall_timeout: Duration,

    /// Time for clients to receive the last replies when the server ends. A source's server that
    /// leaves a request unanswered for six times as long, and at least 5 s, is given up then.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration,
          help_heading = "Limits")]
    pub drain_timeout: Duration,

    /// Most requests of one connection that wait for a disk at a time.
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

/// Parses the value of --listen. Sockets of --socket have options of their own.
fn tcp_address(text: &str) -> Result<ListenAddress, String> {
    match text.parse()? {
        ListenAddress::Unix(path) => Err(format!("write --socket {}", path.display())),
        address => Ok(address),
    }
}
