//! `serve --takeover`: takes over another server's clients and images, and hands over its own.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nbd_jobs::control::server::{Controller, NotClosed, ServedDisks, refuse_removed};
use nbd_jobs::takeover::{Predecessor, Successor, TakenOver, TakeoverError};
use nbd_jobs::text::without_error_numbers;
use nbd_server::{BoundAddress, ExportRegistry, Paused, RunningServer, Server};

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
    /// Gives a server the listening sockets and clients. Returns the addresses of those that a service
    /// manager has passed.
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
    let begun = tokio::task::spawn_blocking(move || Predecessor::begin(&control)).await;
    let begun = begun.map_err(|error| CommandError::new(format!("cancelled: {error}")))?;
    begun.map_err(|error| CommandError::new(error.to_string()))
}

/// Refuses to open files that are no longer those that the other server had open.
async fn check_names(taken: TakenOver, names: Vec<String>) -> Result<TakenOver, CommandError> {
    let checked = tokio::task::spawn_blocking(move || {
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
    let completed = tokio::task::spawn_blocking(move || predecessor.complete()).await;
    let completed = completed.map_err(|error| CommandError::new(format!("cancelled: {error}")))?;
    completed.map_err(|error| CommandError::new(error.to_string()))
}

/// A paused server, and the program that takes over from it.
pub(super) struct HandOver {
    successor: UnixStream,
    paused: Paused,
    registry: ExportRegistry,
    disks: ServedDisks,
}

impl HandOver {
    /// Pauses a server whose control socket is closed.
    ///
    /// # Errors
    ///
    /// If the server has failed.
    pub(super) async fn pause(
        server: RunningServer,
        controller: &Controller,
        successor: UnixStream,
    ) -> Result<Self, CommandError> {
        tracing::info!("another program takes over");
        let registry = server.handle().exports().clone();
        let paused = server.pause().await.map_err(serve_error)?;
        let disks = controller.take_disks().await;
        Ok(Self { successor, paused, registry, disks })
    }

    /// Hands everything over. Returns the resources with which this server continues if the other
    /// program has not taken over.
    ///
    /// # Errors
    ///
    /// If neither server can serve.
    pub(super) async fn carry_out(self) -> Result<Option<Opened>, CommandError> {
        let done = tokio::task::spawn_blocking(move || self.carry_out_blocking()).await;
        done.map_err(|error| CommandError::new(format!("handing over was cancelled: {error}")))
    }

    fn carry_out_blocking(self) -> Option<Opened> {
        let Self { successor, paused, registry, disks } = self;
        let successor = match Successor::new(successor) {
            Ok(successor) => successor,
            Err(error) => {
                log_failure(&error.to_string());
                return Some(goes_on(registry, disks, paused));
            }
        };
        if let Err(error) = &paused.flushed {
            return Some(give_up(successor, &error.to_string(), registry, disks, paused));
        }
        if let Err(failure) = refuse_removed(paused.unregistered()) {
            return Some(give_up(successor, &failure.message, registry, disks, paused));
        }
        let closed = match disks.close(&registry) {
            Ok(closed) => closed,
            Err(not_closed) => {
                let NotClosed { disks, reason } = *not_closed;
                return Some(give_up(successor, &reason, registry, disks, paused));
            }
        };
        tracing::debug!(connections = paused.connections.len(), "images closed, handing over");
        let manager = service_manager::current();
        let handed_over = successor
            .hand_over(&paused, &closed, manager.as_ref())
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
                let (disks, failures) = closed.reopen(&registry);
                for failure in failures {
                    let error = without_error_numbers(failure.to_string());
                    tracing::error!("an export is lost after a failed takeover: {error}");
                }
                Some(goes_on(registry, disks, paused))
            }
        }
    }
}

fn give_up(
    successor: Successor,
    reason: &str,
    registry: ExportRegistry,
    disks: ServedDisks,
    paused: Paused,
) -> Opened {
    log_failure(reason);
    successor.abandon(reason);
    goes_on(registry, disks, paused)
}

fn goes_on(registry: ExportRegistry, disks: ServedDisks, paused: Paused) -> Opened {
    let mut taken = TakenOver::default();
    (taken.listeners, taken.connections) = (paused.listeners, paused.connections);
    Opened { registry, disks: Some(disks), taken, origin: Origin::GoesOn }
}

fn log_failure(reason: &str) {
    let reason = without_error_numbers(reason.to_owned());
    tracing::warn!("the takeover failed, and this server continues: {reason}");
}
