//! `serve --control`: the options and the log of the control socket.

use std::ffi::OsString;
use std::sync::Arc;

use nbd_jobs::blockdev::open_source;
use nbd_jobs::control::server::{ControlEvent, Controller, RequestedSource, ServedDisks};
use nbd_jobs::control::{ErrorKind, Failure};
use nbd_jobs::serving::{ServeOptions, Writes, is_memory};
use nbd_server::ServerHandle;
use nbd_server::export::ExportEntry;

use super::args::ServeArgs;
use super::source;
use crate::serving::temporary_directory;

/// Returns the controller of a server. Exports that are added have the options of `args`, except
/// for those of one image.
pub(super) fn controller(
    server: ServerHandle,
    disks: ServedDisks,
    args: &Arc<ServeArgs>,
) -> Controller {
    let (choices, args) = (source::choices(&args.export), Arc::clone(args));
    let controller = Controller::new(server, disks).observer(log).open_timeout(args.open_timeout);
    let controller = controller.open_sources(move |requested| {
        let choices = choices_for(&choices, requested);
        let opened = open_source(&choices, requested.source.as_ref())
            .map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))?;
        let disk = opened.into_disk(requested.source.clone());
        let disk = disk.configured(|entry| configured(&args, &requested.name, entry));
        let source = OsString::from(&requested.source);
        let is_lost = is_memory(&source) || choices.writes == Writes::ToTemporaryFile;
        Ok(if is_lost { disk } else { source::reopened(disk, source, choices) })
    });
    match temporary_directory() {
        Some(directory) => controller.temporary_directory(directory),
        None => controller,
    }
}

/// Applies the options of the command line for all exports, and for this name, to an export.
fn configured(args: &ServeArgs, name: &str, mut entry: ExportEntry) -> ExportEntry {
    if args.tls.tls_only.iter().any(|only| only == name) {
        entry = entry.tls_required();
    }
    if args.export.hidden {
        entry = entry.hidden();
    }
    args.export.access.settings().apply(name, entry)
}

fn choices_for(common: &ServeOptions, requested: &RequestedSource) -> ServeOptions {
    let mut choices = common.clone();
    choices.snapshot = None;
    choices.writes = match (requested.read_only, common.writes) {
        (true, _) | (_, Writes::Refused) => Writes::Refused,
        // With --temporary the server changes no image. A disk in memory has no need of an overlay.
        (false, Writes::ToTemporaryFile) if !is_memory(requested.source.as_ref()) => common.writes,
        (false, _) => Writes::ToImage,
    };
    choices.format = requested.format;
    choices
}

fn log(event: &ControlEvent<'_>) {
    match event {
        ControlEvent::ExportAdded { export } => tracing::info!(%export, "export added"),
        ControlEvent::ExportRemoved { export } => tracing::info!(%export, "export removed"),
        ControlEvent::CheckpointStarted { export, view } => {
            tracing::info!(%export, %view, "checkpoint started");
        }
        ControlEvent::CheckpointEnded { export, outcome } => {
            tracing::info!(%export, ?outcome, "checkpoint ended");
        }
        ControlEvent::CheckpointNotEnded { export, failure } => {
            tracing::error!(%export, why = %failure, "checkpoint not ended");
        }
        ControlEvent::BitmapNotOffered { bitmap, error } => {
            tracing::error!(%bitmap, %error, "bitmap not offered");
        }
        ControlEvent::FrozenBitsUnreadable { error } => {
            tracing::error!(%error, "cannot look at a frozen bitmap");
        }
        ControlEvent::StreamPaused { export, problem } => {
            tracing::warn!(%export, why = %problem, "stream paused");
        }
        ControlEvent::StreamEnded { export, state } => match &state.problem {
            None => tracing::info!(%export, phase = ?state.phase, "stream ended"),
            Some(problem) => tracing::error!(%export, why = %problem, "stream failed"),
        },
        ControlEvent::ClientNotAccepted { error } => {
            tracing::warn!(%error, "cannot accept a client of the control socket");
        }
        ControlEvent::TooManyClients => {
            tracing::warn!("too many busy clients of the control socket; closed a new one");
        }
        ControlEvent::ClientLost { error } => {
            tracing::info!(%error, "a client of the control socket has left");
        }
        event => tracing::info!(?event, "event of the control socket"),
    }
}
