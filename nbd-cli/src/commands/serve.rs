//! `nbd-cli serve`: export disk images, block devices and memory disks.

mod access;
mod address;
mod args;
mod captive;
mod config;
mod control;
mod export;
mod reload;
mod socket_file;
mod source;
mod takeover;
mod tls;
mod upstream;

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nbd_jobs::control::server::{ControlSocket, Controller};
use nbd_jobs::monitor::{Monitor, MonitorError, RunningMonitor};
use nbd_jobs::opening::open_within;
use nbd_jobs::serving::PrivateDirectory;
use nbd_jobs::size::ByteSize;
use nbd_jobs::tasks;
use nbd_server::tls::TlsMode;
use nbd_server::{BoundAddress, ExportRegistry, ListenAddress, Server, ServerConfig};
use tokio::task::JoinHandle;

pub use self::access::AccessArgs;
use self::address::TcpAddress;
pub use self::args::ServeArgs;
use self::captive::Captive;
use self::config::Config;
pub(crate) use self::config::refuse_options_beside_file;
pub use self::export::ExportArgs;
use self::export::ExportSpec;
use self::reload::{ReloadHandle, Reloader};
pub use self::socket_file::SocketFileArgs;
use self::takeover::{ControlSockets, HandOver, Opened, Origin};
pub use self::tls::{TlsArgs, TlsChoice};
pub use self::upstream::UpstreamArgs;
use crate::error::{CommandError, Outcome};
use crate::logging;
use crate::output::warn;
use crate::serving::background::{self, Role};
pub use crate::serving::{Aio, BitmapDurability, CacheMode, DetectZeroes, Discard, FilterArgs};
use crate::serving::{
    PidFile, drain, give_up_silent_sources, runtime, serve_error, serve_until_signal,
    service_manager,
};
use crate::signals::{self, EndSignals, Hangup};

pub(crate) fn run(args: ServeArgs) -> Result<Outcome, CommandError> {
    if args.role == Role::Background {
        background::leave_session();
    }
    if args.fork && service_manager::gave_sockets() {
        return Err(CommandError::new(
            "--fork is not possible with sockets of a service manager; leave it out",
        ));
    }
    // Dropped after the runtime, whose tasks may hold images.
    let mut guard = None;
    tasks::block_on(&runtime()?, serve(args, &mut guard))
}

/// Serves. The value in `guard` has to be dropped after everything that is open.
async fn serve(args: ServeArgs, guard: &mut Option<UnixStream>) -> Result<Outcome, CommandError> {
    let mut signals = EndSignals::new(Hangup::EndsWithTerminal)?;
    let (args, file) = with_file(args)?;
    let tls = args.tls.load()?;
    let exports = match &file {
        Some(file) => file.specs(),
        None => source::exports(&args)?,
    };
    if args.check {
        return check(&args, &tls, exports).await;
    }
    // Find errors here before another server is paused.
    config(&args, &tls)?;
    let (args, exports) = (Arc::new(args), Arc::new(exports));
    let mut opened = Opened::new(&args, &exports, &mut signals, guard).await?;
    if file.is_none() {
        tls::reload_on_hangup(&tls)?;
    }
    signals::on_hangup(logging::reopen)?;
    let mut signals = Some(signals);
    let file = file.map(|file| Arc::new(Mutex::new(file)));
    let setup = Setup { args, exports, tls, file };
    loop {
        match setup.serve(opened, &mut signals, guard).await? {
            Served::Ended(outcome) => return Ok(outcome),
            Served::HandsOver(hand_over) => {
                let Some(signals) = &mut signals else { return Ok(Outcome::Success) };
                let Some(again) = signals.meanwhile(hand_over.carry_out()).await? else {
                    return Ok(Outcome::Success);
                };
                opened = again;
            }
        }
    }
}

/// The settings of a server.
struct Setup {
    args: Arc<ServeArgs>,
    exports: Arc<Vec<ExportSpec>>,
    tls: TlsMode,
    /// The configuration file, as of the last reload.
    file: Option<Arc<Mutex<Config>>>,
}

/// The way in which serving ended.
enum Served {
    Ended(Outcome),
    /// Another program takes over.
    HandsOver(Box<HandOver>),
}

impl Setup {
    /// Serves the opened exports until a signal, or until another program takes over.
    async fn serve(
        &self,
        opened: Opened,
        signals: &mut Option<EndSignals>,
        guard: &mut Option<UnixStream>,
    ) -> Result<Served, CommandError> {
        let Self { args, exports, tls, file } = self;
        let Opened { origin, mut taken, disks, registry } = opened;
        let names: Vec<_> = exports.iter().map(|export| export.name.clone()).collect();
        let private = private_directory(args)?;
        // Declared after the directory, so that its socket is always removed first.
        let mut server = Server::new(config(args, tls)?, registry.clone());
        let taken_control = taken.control.take();
        let mut bound = origin.adopt(&mut server, taken)?;
        for address in addresses(args, private.as_ref(), !bound.is_empty()) {
            bound.extend(args.sockets.listen(&mut server, &address).await?);
        }
        let goes_on = matches!(origin, Origin::GoesOn);
        if !goes_on {
            let are_read_only = exports.iter().all(|export| export.options.read_only);
            warn_of_exposure(&bound, tls, if are_read_only { "" } else { " and change" });
        }
        let (reload, wishes) = ReloadHandle::new();
        let sockets = ControlSockets::open(args.control.as_deref(), taken_control, goes_on).await?;
        let controller = match (&sockets.own, disks) {
            (Some(_), Some(disks)) => {
                let (bound, tls) = (bound.clone(), tls.clone());
                let mut controller = control::controller(server.handle(), disks, args)
                    .uris(move |name| uris(&bound, name, &tls));
                if file.is_some() {
                    controller = controller.reload(move || Box::pin(reload.clone().reload()));
                }
                Some(Arc::new(controller))
            }
            _ => None,
        };
        let reloading = match (file, args.config.clone()) {
            (Some(config), Some(path)) => {
                let (tls, server) = (tls.clone(), server.handle());
                Some(Reloader::new(path, config, tls, server, controller.clone()).start(wishes)?)
            }
            _ => None,
        };
        let monitor = takeover::patiently(goes_on, async || monitor(args, &server)).await?;
        if let Some(command) = &args.run {
            let Some(signals) = signals else { return Ok(Served::Ended(Outcome::Success)) };
            let captive = Captive::start(command, &bound, &names, tls)?;
            let served = serve_while_running(server, args.drain_timeout, captive, signals);
            return served.await.map(Served::Ended);
        }
        let pid_file = started(args, origin, || announce(&bound, &names, tls)).await?;
        *guard = None;
        logging::include_warnings();
        let served = match (sockets.own(), controller) {
            (Some(socket), Some(controller)) => {
                serve_controlled(server, args.drain_timeout, signals, (socket, controller)).await
            }
            _ => serve_until_end(server, args.drain_timeout, signals).await,
        };
        if let Ok(Served::HandsOver(_)) = &served {
            stop_helpers(monitor, reloading).await;
            drop(pid_file);
        } else {
            pid_file.into_iter().for_each(PidFile::keep);
            close(registry, monitor, reloading).await;
        }
        served
    }
}

async fn serve_until_end(
    server: Server,
    drain_timeout: Duration,
    signals: &mut Option<EndSignals>,
) -> Result<Served, CommandError> {
    if let Some(signals) = signals.take() {
        serve_until_signal(server, drain_timeout, signals, std::future::pending()).await?;
    }
    Ok(Served::Ended(Outcome::Success))
}

/// Creates the directory of a private socket for a command, if there is one.
fn private_directory(args: &ServeArgs) -> Result<Option<PrivateDirectory>, CommandError> {
    let is_wanted = args.run.is_some() && args.listen.is_empty() && args.socket.is_empty();
    Ok(is_wanted.then(PrivateDirectory::new).transpose()?)
}

/// Closes the images.
async fn close(
    registry: ExportRegistry,
    monitor: Option<RunningMonitor>,
    reloading: Option<JoinHandle<()>>,
) {
    stop_helpers(monitor, reloading).await;
    // The last one to drop an image closes it, which may block. Each has a thread, because one may
    // hang until its server is given up.
    let closing = registry.entries().into_iter().map(|(name, entry)| {
        let registry = registry.clone();
        tasks::spawn_blocking(move || drop((entry, registry.remove(&name))))
    });
    for closed in closing.collect::<Vec<_>>() {
        let _ = closed.await;
    }
}

/// Stops the helpers of the server, which may hold its exports.
async fn stop_helpers(monitor: Option<RunningMonitor>, reloading: Option<JoinHandle<()>>) {
    if let Some(reloading) = reloading {
        reloading.abort();
        let _ = reloading.await;
    }
    // Waiting for the monitor may block.
    let _ = tasks::spawn_blocking(move || drop(monitor)).await;
}

/// Returns the options of the file, if there is one, together with command line options that a file
/// cannot have.
fn with_file(args: ServeArgs) -> Result<(ServeArgs, Option<Config>), CommandError> {
    let Some(path) = &args.config else { return Ok((args, None)) };
    let path = std::path::absolute(path)
        .map_err(|error| CommandError::new(format!("cannot use '{}': {error}", path.display())))?;
    let config = Config::read(&path)?;
    let ServeArgs { check, fork, role, keeps_log, run, pid_file, takeover, .. } = args;
    let file = config.args.clone();
    if run.is_some() && file.control.is_some() {
        return Err(CommandError::new(
            "--run is not possible with a control socket; remove 'control' from the file",
        ));
    }
    let pid_file = pid_file.or_else(|| file.pid_file.clone());
    let config_path = Some(path);
    let args = ServeArgs {
        config: config_path,
        check,
        fork,
        role,
        keeps_log,
        run,
        pid_file,
        takeover,
        ..file
    };
    Ok((args, Some(config)))
}

/// `--check`: opens everything, for reading only.
async fn check(
    args: &ServeArgs,
    tls: &TlsMode,
    exports: Vec<ExportSpec>,
) -> Result<Outcome, CommandError> {
    config(args, tls)?;
    let count = exports.len();
    let opening = open_within(args.open_timeout, "opening", move |step| {
        exports.iter().try_for_each(|export| {
            step.begin(source::opening(export));
            source::try_to_open(export)
        })
    });
    opening.await??;
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "the configuration is valid; exports: {count}");
    Ok(Outcome::Success)
}

/// Starts the status page. It holds the exports until it is dropped, which closes their images.
fn monitor(args: &ServeArgs, server: &Server) -> Result<Option<RunningMonitor>, CommandError> {
    let Some(address) = &args.metrics else { return Ok(None) };
    let explained = |error: MonitorError| CommandError::new(error.to_string());
    let monitor = Monitor::open(address).map_err(explained)?;
    let (shown, is_public) = monitor.address();
    tracing::info!(address = %shown, "status page and metrics");
    if is_public {
        warn(&format!(
            "the metrics at {shown} can be read by other machines: the names of exports, the \
             addresses of clients, and where the disks are used; use 127.0.0.1, unix:PATH or a \
             firewall"
        ));
    }
    monitor.start(server.handle()).map(Some).map_err(explained)
}

/// Serves until a signal, a request to stop, or a program that takes over.
async fn serve_controlled(
    server: Server,
    drain_timeout: Duration,
    signals: &mut Option<EndSignals>,
    (socket, controller): (ControlSocket, Arc<Controller>),
) -> Result<Served, CommandError> {
    let Some(signal) = signals else { return Ok(Served::Ended(Outcome::Success)) };
    let socket = Arc::new(socket);
    let (accepting, served) = (Arc::clone(&socket), Arc::clone(&controller));
    let listening = tasks::spawn(async move { accepting.serve(served).await });
    let mut server = server.start();
    let mut failed = None;
    let successor = tokio::select! {
        _ = signal.next() => None,
        () = controller.shutdown_requested() => None,
        successor = controller.takeover_requested() => Some(successor),
        ended = server.wait() => {
            failed = ended.err();
            None
        }
    };
    if let Some(successor) = successor {
        // Clients that connect from now on are served by the program that goes on.
        listening.abort();
        let _ = listening.await;
        let control = (Arc::into_inner(socket), &*controller);
        let pause = HandOver::pause(server, control, successor);
        let hand_over = signal.meanwhile(pause).await?;
        return Ok(Served::HandsOver(Box::new(hand_over)));
    }
    if let Some(mut signals) = signals.take() {
        // A second signal ends the process without waiting for slow clients.
        tasks::spawn(async move {
            std::process::exit(signals.insisted().await.exit_status().into());
        });
    }
    service_manager::stopping();
    give_up_silent_sources(drain_timeout);
    server.shutdown();
    let served = match failed {
        Some(error) => Err(error),
        None => server.wait().await,
    };
    // The socket's file is removed before the disks are reported closed.
    listening.abort();
    let _ = listening.await;
    drop(socket);
    controller.end_checkpoints().await;
    // A client of the control socket that stays connected holds the controller.
    controller.release_disks().await;
    served.map(|()| Served::Ended(Outcome::Success)).map_err(serve_error)
}

async fn serve_while_running(
    server: Server,
    drain_timeout: Duration,
    mut captive: Captive,
    signals: &mut EndSignals,
) -> Result<Outcome, CommandError> {
    let mut status = Ok(0);
    let ended = async {
        status = captive.wait(signals).await;
    };
    drain(server, drain_timeout, ended).await?;
    Ok(Outcome::Status(status?))
}

/// Returns true for an address that other machines can reach.
fn is_exposed(address: &BoundAddress) -> bool {
    matches!(address, BoundAddress::Tcp(address) if !address.ip().is_loopback())
}

fn warn_of_exposure(bound: &[BoundAddress], tls: &TlsMode, and_change: &str) {
    let Some(why) = tls::exposure(tls) else { return };
    for address in bound.iter().filter(|address| is_exposed(address)) {
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
            .map_err(|_| CommandError::new(format!("{option} {size} is too large for this system")))
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

/// Returns the addresses to listen on: the given ones, or else a private socket for a command, or
/// else the loopback interface. Sockets of a service manager may have been taken over already.
fn addresses(
    args: &ServeArgs,
    private: Option<&PrivateDirectory>,
    has_passed: bool,
) -> Vec<ListenAddress> {
    let tcp = args.listen.iter().map(|address| ListenAddress::Tcp(address.to_string()));
    let unix = args.socket.iter().cloned().map(ListenAddress::Unix);
    let mut addresses: Vec<_> = tcp.chain(unix).collect();
    if has_passed {
        return addresses;
    }
    if service_manager::gave_sockets() {
        addresses.push(ListenAddress::Systemd);
    } else if let Some(directory) = private {
        addresses.push(ListenAddress::Unix(directory.socket()));
    }
    if addresses.is_empty() {
        addresses.push(ListenAddress::Tcp(TcpAddress::default().to_string()));
    }
    addresses
}

/// Reports that clients can connect: with the process id file, the printed addresses, and a
/// notification of a waiting parent. In a takeover, the other server ends first.
async fn started(
    args: &ServeArgs,
    origin: Origin,
    announce: impl FnOnce(),
) -> Result<Option<PidFile>, CommandError> {
    let goes_on = matches!(origin, Origin::GoesOn);
    let write = async || args.pid_file.as_deref().map(PidFile::write).transpose();
    let pid_file = takeover::patiently(goes_on, write).await?;
    match origin {
        Origin::Started => {}
        Origin::TakesOver(predecessor) => {
            takeover::complete(predecessor).await?;
            service_manager::main_process(std::process::id());
        }
        // All of them know.
        Origin::GoesOn => return Ok(pid_file),
    }
    announce();
    if args.role == Role::Background {
        background::ready(args.keeps_log)?;
    }
    service_manager::ready();
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
