//! `nbd-cli serve`: export disk images, block devices and memory disks.

mod access;
mod args;
mod captive;
mod config;
mod control;
mod export;
mod listening;
mod reload;
mod running;
mod socket_file;
mod source;
mod takeover;
mod tls;
mod upstream;

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nbd_jobs::monitor::{Monitor, MonitorError, RunningMonitor};
use nbd_jobs::opening::open_within;
use nbd_jobs::size::ByteSize;
use nbd_jobs::tasks;
use nbd_server::tls::TlsMode;
use nbd_server::{Server, ServerConfig};

pub use self::access::AccessArgs;
pub use self::args::ServeArgs;
use self::captive::Captive;
use self::config::Config;
pub(crate) use self::config::refuse_options_beside_file;
pub use self::export::ExportArgs;
use self::export::ExportSpec;
use self::listening::{addresses, announce, private_directory, uris, warn_of_exposure};
use self::reload::{ReloadHandle, Reloader};
use self::running::{
    Served, close, serve_controlled, serve_until_end, serve_while_running, stop_helpers,
};
pub use self::socket_file::SocketFileArgs;
use self::takeover::{ControlSockets, Opened, Origin};
pub use self::tls::{TlsArgs, TlsChoice};
pub use self::upstream::UpstreamArgs;
use crate::error::{CommandError, Outcome};
use crate::logging;
use crate::output::warn;
use crate::serving::background::{self, Role};
pub use crate::serving::{Aio, BitmapDurability, CacheMode, DetectZeroes, Discard, FilterArgs};
use crate::serving::{PidFile, allow_descriptors, runtime, service_manager};
use crate::shown::a_close_failed;
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
    let outcome = tasks::block_on(&runtime()?, serve(args, &mut guard))?;
    // The log says why. A status of a command that says more stays.
    Ok(match outcome {
        Outcome::Success if a_close_failed() => Outcome::Status(1),
        outcome => outcome,
    })
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
        allow_descriptors();
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
