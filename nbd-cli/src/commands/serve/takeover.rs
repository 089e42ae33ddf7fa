//! `serve --takeover`: takes over another server's clients and images, and hands over its own.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nbd_jobs::control::server::{
    ControlSocket, Controller, NotClosed, ServedDisks, refuse_removed,
};
use nbd_jobs::takeover::{Predecessor, Successor, TakenOver, TakeoverError};
use nbd_jobs::tasks;
use nbd_jobs::text::without_error_numbers;
use nbd_server::{BoundAddress, ExportRegistry, Paused, PausedListener, RunningServer, Server};

use super::args::ServeArgs;
use super::export::ExportSpec;
use super::source::open_sources;
use crate::error::CommandError;
use crate::serving::{serve_error, service_manager};
use crate::signals::EndSignals;

/// Number of attempts of a server that continues: about ten seconds.
const ATTEMPTS: u32 = 200;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(50);

/// The resources with which a server starts.
pub(super) struct Opened {
    pub(super) registry: ExportRegistry,
    /// The disks of a server with a control socket, or of one that takes over.
    pub(super) disks: Option<ServedDisks>,
    pub(super) taken: TakenOver,
    pub(super) origin: Origin,
}

/// The control sockets of a server that starts.
pub(super) struct ControlSockets {
    pub(super) own: Option<ControlSocket>,
    /// That of the other server, if this one has another path or none.
    others: Option<ControlSocket>,
}

impl ControlSockets {
    /// Uses the socket that was taken over if it is at the `path` of this server's.
    ///
    /// # Errors
    ///
    /// If no socket can be opened at the path.
    pub(super) async fn open(
        path: Option<&Path>,
        taken: Option<PausedListener>,
        goes_on: bool,
    ) -> Result<Self, CommandError> {
        let adopted = taken.map(ControlSocket::adopt).transpose().map_err(|error| {
            CommandError::new(format!("cannot use the control socket that was taken over: {error}"))
        })?;
        let Some(path) = path else { return Ok(Self { own: None, others: adopted }) };
        if adopted.as_ref().is_some_and(|adopted| adopted.is_at(path)) {
            return Ok(Self { own: adopted, others: None });
        }
        Ok(Self { own: Some(open_control(path, goes_on).await?), others: adopted })
    }

    /// From now on this server alone has them: the other one's is removed.
    pub(super) fn own(self) -> Option<ControlSocket> {
        if let Some(mut others) = self.others {
            others.own();
        }
        let mut own = self.own?;
        own.own();
        Some(own)
    }
}

async fn open_control(path: &Path, goes_on: bool) -> Result<ControlSocket, CommandError> {
    let open = async || {
        let socket = ControlSocket::open(path).await;
        socket.map_err(|error| CommandError::new(error.to_string()))
    };
    patiently(goes_on, open).await
}

/// The origin of this server's clients.
pub(super) enum Origin {
    /// None yet: the server was started.
    Started,
    /// From another server, which waits until this one is ready.
    TakesOver(Predecessor),
    /// Its own: another program failed to take over.
    GoesOn,
}

impl Origin {
    /// Gives a server the listening sockets and clients. Returns the addresses of those that a
    /// service manager has passed.
    pub(super) fn adopt(
        &self,
        server: &mut Server,
        TakenOver { listeners, connections, .. }: TakenOver,
    ) -> Result<Vec<BoundAddress>, CommandError> {
        let adopted = match self {
            Self::GoesOn => server.go_on(listeners, connections),
            Self::Started | Self::TakesOver(_) => server.adopt(listeners, connections),
        };
        adopted.map_err(serve_error)
    }
}

fn connection(predecessor: &Predecessor) -> Result<UnixStream, CommandError> {
    predecessor.connection().map_err(|error| {
        CommandError::new(format!("cannot keep the connection to the running server: {error}"))
    })
}

/// Repeats an attempt that an ending program, which failed to take over, may still prevent for a
/// moment.
///
/// # Errors
///
/// The error of the last attempt.
pub(super) async fn patiently<T>(
    goes_on: bool,
    attempt: impl AsyncFn() -> Result<T, CommandError>,
) -> Result<T, CommandError> {
    if goes_on {
        for _ in 0..ATTEMPTS {
            match attempt().await {
                Err(_) => tokio::time::sleep(BETWEEN_ATTEMPTS).await,
                done => return done,
            }
        }
    }
    attempt().await
}

impl Opened {
    /// Opens the sources; in a takeover, after the other server has closed them. If the takeover
    /// fails, that server waits for `guard` to be dropped before it continues: drop it after
    /// everything that is open, or when this server serves.
    ///
    /// # Errors
    ///
    /// If that server continues, or a source cannot be opened.
    pub(super) async fn new(
        args: &Arc<ServeArgs>,
        exports: &Arc<Vec<ExportSpec>>,
        signals: &mut EndSignals,
        guard: &mut Option<UnixStream>,
    ) -> Result<Self, CommandError> {
        let (mut taken, mut origin) = (TakenOver::default(), Origin::Started);
        if let Some(control) = &args.takeover {
            let predecessor;
            (predecessor, taken) = signals.meanwhile(begin(control)).await?;
            *guard = Some(connection(&predecessor)?);
            if let Some(manager) = taken.manager.take() {
                service_manager::adopt(manager);
            }
            origin = Origin::TakesOver(predecessor);
        }
        let registry = ExportRegistry::new();
        let names: Vec<_> = exports.iter().map(|export| export.name.clone()).collect();
        taken.name_default(&names).map_err(|error| CommandError::new(error.to_string()))?;
        taken = signals.meanwhile(check_names(taken, names)).await?;
        let disks = signals.meanwhile(open_sources(args, exports, &registry)).await?;
        if let Some(disks) = &disks {
            taken.check_same(disks).map_err(|error| CommandError::new(error.to_string()))?;
        }
        Ok(Self { registry, disks, taken, origin })
    }
}

async fn begin(control: &Path) -> Result<(Predecessor, TakenOver), CommandError> {
    let control = control.to_owned();
    let begun = tasks::spawn_blocking(move || Predecessor::begin(&control)).await;
    let begun = begun.map_err(|error| CommandError::new(format!("cancelled: {error}")))?;
    begun.map_err(|error| CommandError::new(error.to_string()))
}

/// Refuses to open files that are no longer those that the other server had open.
async fn check_names(taken: TakenOver, names: Vec<String>) -> Result<TakenOver, CommandError> {
    let checked = tasks::spawn_blocking(move || {
        taken.check_names(names.iter().map(|name| &**name)).map(|()| taken)
    });
    let checked =
        checked.await.map_err(|error| CommandError::new(format!("cancelled: {error}")))?;
    checked.map_err(|error| CommandError::new(error.to_string()))
}

/// Ends the other server, when everything is open.
///
/// # Errors
///
/// If it continues.
pub(super) async fn complete(predecessor: Predecessor) -> Result<(), CommandError> {
    let completed = tasks::spawn_blocking(move || predecessor.complete()).await;
    let completed = completed.map_err(|error| CommandError::new(format!("cancelled: {error}")))?;
    completed.map_err(|error| CommandError::new(error.to_string()))
}

/// A paused server, and the program that takes over from it.
pub(super) struct HandOver {
    successor: UnixStream,
    kept: Kept,
    disks: ServedDisks,
}

/// What a paused server keeps while the other program has the images.
struct Kept {
    paused: Paused,
    control: Option<PausedListener>,
    registry: ExportRegistry,
}

impl Kept {
    /// The server goes on.
    fn go_on(self, disks: ServedDisks) -> Opened {
        let Self { paused, control, registry } = self;
        let mut taken = TakenOver::default();
        (taken.listeners, taken.connections) = (paused.listeners, paused.connections);
        taken.control = control;
        Opened { registry, disks: Some(disks), taken, origin: Origin::GoesOn }
    }

    /// The server goes on, because the other program was refused.
    fn give_up(self, successor: Successor, reason: &str, disks: ServedDisks) -> Opened {
        log_failure(reason);
        successor.abandon(reason);
        self.go_on(disks)
    }
}

impl HandOver {
    /// Pauses a server that serves no clients of its control socket any more.
    ///
    /// # Errors
    ///
    /// If the server has failed.
    pub(super) async fn pause(
        server: RunningServer,
        (socket, controller): (Option<ControlSocket>, &Controller),
        successor: UnixStream,
    ) -> Result<Self, CommandError> {
        tracing::info!("another program takes over");
        let registry = server.handle().exports().clone();
        let paused = server.pause().await.map_err(serve_error)?;
        let disks = controller.take_disks().await;
        // If it cannot be released, both programs make another one.
        let control = socket.and_then(|socket| socket.pause().ok());
        Ok(Self { successor, kept: Kept { paused, control, registry }, disks })
    }

    /// Hands everything over. Returns the resources with which this server continues if the other
    /// program has not taken over.
    ///
    /// # Errors
    ///
    /// If neither server can serve.
    pub(super) async fn carry_out(self) -> Result<Option<Opened>, CommandError> {
        let done = tasks::spawn_blocking(move || self.carry_out_blocking()).await;
        done.map_err(|error| CommandError::new(format!("handing over was cancelled: {error}")))
    }

    fn carry_out_blocking(self) -> Option<Opened> {
        let Self { successor, kept, disks } = self;
        let (paused, registry) = (&kept.paused, &kept.registry);
        let successor = match Successor::new(successor) {
            Ok(successor) => successor,
            Err(error) => {
                log_failure(&error.to_string());
                return Some(kept.go_on(disks));
            }
        };
        if let Err(error) = &paused.flushed {
            let reason = error.to_string();
            return Some(kept.give_up(successor, &reason, disks));
        }
        if let Err(failure) = refuse_removed(paused.unregistered()) {
            return Some(kept.give_up(successor, &failure.message, disks));
        }
        let closed = match disks.close(registry) {
            Ok(closed) => closed,
            Err(not_closed) => {
                let NotClosed { disks, reason } = *not_closed;
                return Some(kept.give_up(successor, &reason, disks));
            }
        };
        tracing::debug!(connections = paused.connections.len(), "images closed, handing over");
        let manager = service_manager::current();
        let handed_over = successor
            .hand_over(paused, &closed, manager.as_ref(), kept.control.as_ref())
            .and_then(|()| successor.confirm());
        match handed_over {
            Ok(()) => {
                let process = successor.process_id();
                tracing::info!(?process, "another program has taken over");
                if let Some(process) = process {
                    service_manager::main_process(process);
                }
                None
            }
            Err(error) => {
                let reason = match error {
                    TakeoverError::Gone => "the other program has ended".to_owned(),
                    error => error.to_string(),
                };
                log_failure(&reason);
                successor.abandon(&reason);
                let (disks, failures) = closed.reopen(registry);
                for failure in failures {
                    let error = without_error_numbers(failure.to_string());
                    tracing::error!("an export is lost after a failed takeover: {error}");
                }
                Some(kept.go_on(disks))
            }
        }
    }
}

fn log_failure(reason: &str) {
    let reason = without_error_numbers(reason.to_owned());
    tracing::warn!("the takeover failed, and this server continues: {reason}");
}
