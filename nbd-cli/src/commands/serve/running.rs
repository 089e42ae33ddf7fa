//! Serves until a signal, a request or a command ends it, and closes what was served.

use std::sync::Arc;
use std::time::Duration;

use nbd_jobs::control::server::{ControlSocket, Controller};
use nbd_jobs::monitor::RunningMonitor;
use nbd_jobs::tasks;
use nbd_server::{ExportRegistry, Server};
use tokio::task::JoinHandle;

use super::captive::Captive;
use super::takeover::HandOver;
use crate::error::{CommandError, Outcome};
use crate::serving::{
    drain, give_up_silent_sources, serve_error, serve_until_signal, service_manager,
};
use crate::signals::EndSignals;

/// The way in which serving ended.
pub(super) enum Served {
    Ended(Outcome),
    /// Another program takes over.
    HandsOver(Box<HandOver>),
}

pub(super) async fn serve_until_end(
    server: Server,
    drain_timeout: Duration,
    signals: &mut Option<EndSignals>,
) -> Result<Served, CommandError> {
    if let Some(signals) = signals.take() {
        serve_until_signal(server, drain_timeout, signals, std::future::pending()).await?;
    }
    Ok(Served::Ended(Outcome::Success))
}

/// Serves until a signal, a request to stop, or a program that takes over.
pub(super) async fn serve_controlled(
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

pub(super) async fn serve_while_running(
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

/// Closes the images.
pub(super) async fn close(
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
pub(super) async fn stop_helpers(
    monitor: Option<RunningMonitor>,
    reloading: Option<JoinHandle<()>>,
) {
    if let Some(reloading) = reloading {
        reloading.abort();
        let _ = reloading.await;
    }
    // Waiting for the monitor may block.
    let _ = tasks::spawn_blocking(move || drop(monitor)).await;
}
