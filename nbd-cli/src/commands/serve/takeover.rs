//! `serve --takeover`: another server's clients and images become this one's, and the reverse.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nbd_jobs::control::server::{Controller, NotClosed, ServedDisks};
use nbd_jobs::takeover::{Predecessor, Successor, TakenOver, TakeoverError};
use nbd_jobs::text::{printable, without_error_numbers};
use nbd_server::{BoundAddress, ExportRegistry, Paused, RunningServer, Server};

use super::args::ServeArgs;
use super::export::ExportSpec;
use super::source::open_sources;
use crate::error::CommandError;
use crate::serving::{serve_error, service_manager};
use crate::signals::EndSignals;

/// Attempts of a server that goes on, about ten seconds.
const ATTEMPTS: u32 = 200;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(50);

/// What a server starts with.
pub(super) struct Opened {
    pub(super) registry: ExportRegistry,
    /// Of a server with a control socket.
    pub(super) disks: Option<ServedDisks>,
    pub(super) taken: TakenOver,
    pub(super) origin: Origin,
}

/// How this server has come to its clients.
pub(super) enum Origin {
    /// They come from now on.
    Started,
    /// From a server that waits until this one is ready.
    TakesOver(Predecessor),
    /// They are its own: another program was to take over, and did not.
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

/// Tries what a program that was to take over may still prevent for a moment, because it is ending.
///
/// # Errors
///
/// That of the last attempt.
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
    /// Opens the sources, after another server has closed them if this one takes over. That server
    /// waits for `guard` to be dropped before it goes on: it has to be dropped after everything that
    /// is open, and may be when this server serves.
    ///
    /// # Errors
    ///
    /// If that server goes on, or a source cannot be opened.
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
            origin = Origin::TakesOver(predecessor);
        }
        let registry = ExportRegistry::new();
        let names: Vec<_> = exports.iter().map(|export| export.name.clone()).collect();
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
    let begun = begun.map_err(|error| CommandError::new(format!("given up: {error}")))?;
    begun.map_err(|error| CommandError::new(error.to_string()))
}

/// Refuses to open what is not there any more as the other server had it.
async fn check_names(taken: TakenOver, names: Vec<String>) -> Result<TakenOver, CommandError> {
    let checked = tokio::task::spawn_blocking(move || {
        taken.check_names(names.iter().map(|name| &**name)).map(|()| taken)
    });
    let checked = checked.await.map_err(|error| CommandError::new(format!("given up: {error}")))?;
    checked.map_err(|error| CommandError::new(error.to_string()))
}

/// Everything is open: the other server ends.
///
/// # Errors
///
/// If it goes on.
pub(super) async fn complete(predecessor: Predecessor) -> Result<(), CommandError> {
    let completed = tokio::task::spawn_blocking(move || predecessor.complete()).await;
    let completed = completed.map_err(|error| CommandError::new(format!("given up: {error}")))?;
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

    /// Hands everything over. Returns what this server goes on with if the other program has not
    /// taken over.
    ///
    /// # Errors
    ///
    /// If neither of both can serve.
    pub(super) async fn carry_out(self) -> Result<Option<Opened>, CommandError> {
        let done = tokio::task::spawn_blocking(move || self.carry_out_blocking()).await;
        done.map_err(|error| CommandError::new(format!("handing over was given up: {error}")))
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
        let unregistered = paused.unregistered().next().map(printable);
        if let Some(name) = unregistered {
            let reason = format!(
                "clients still use the export '{name}', which was removed or replaced; wait until \
                 they have disconnected"
            );
            return Some(give_up(successor, &reason, registry, disks, paused));
        }
        let closed = match disks.close(&registry) {
            Ok(closed) => closed,
            Err(not_closed) => {
                let NotClosed { disks, reason } = *not_closed;
                return Some(give_up(successor, &reason, registry, disks, paused));
            }
        };
        tracing::debug!(connections = paused.connections.len(), "images closed, handing over");
        let handed_over = successor.hand_over(&paused, &closed).and_then(|()| successor.confirm());
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
                    tracing::error!("an export is lost after a takeover that failed: {error}");
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
    tracing::warn!("the takeover failed, and this server goes on: {reason}");
}
