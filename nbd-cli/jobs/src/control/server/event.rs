//! Events of a control socket, for the log of a server.

use std::io;
use std::sync::Arc;

use crate::control::{Failure, Outcome, StreamState};

/// An event of a control socket.
#[derive(Debug)]
#[non_exhaustive]
pub enum ControlEvent<'a> {
    /// An export was added.
    ExportAdded {
        /// Its name.
        export: &'a str,
    },
    /// An export was removed.
    ExportRemoved {
        /// Its name.
        export: &'a str,
    },
    /// A checkpoint was started.
    CheckpointStarted {
        /// Name of the export.
        export: &'a str,
        /// Name of the view's export.
        view: &'a str,
    },
    /// A checkpoint was ended.
    CheckpointEnded {
        /// Name of the export.
        export: &'a str,
        /// The outcome of the backup.
        outcome: Outcome,
    },
    /// A checkpoint without an owner could not be ended: its bits stay frozen.
    CheckpointNotEnded {
        /// Name of the export.
        export: &'a str,
        /// The reason.
        failure: &'a Failure,
    },
    /// After a checkpoint, the export does not offer the bitmap any more.
    BitmapNotOffered {
        /// Name of the bitmap.
        bitmap: &'a str,
        /// The reason.
        error: &'a imgfmt::Error,
    },
    /// The frozen bits of a checkpoint cannot be read. The client got an error.
    FrozenBitsUnreadable {
        /// The reason.
        error: &'a imgfmt::Error,
    },
    /// A stream waits until a layer below can be read.
    StreamPaused {
        /// Name of the export.
        export: &'a str,
        /// Why it cannot be read.
        problem: &'a str,
    },
    /// A stream has ended.
    StreamEnded {
        /// Name of the export.
        export: &'a str,
        /// Its last state.
        state: &'a StreamState,
    },
    /// A client of the control socket cannot be accepted. The server continues.
    ClientNotAccepted {
        /// The reason.
        error: &'a io::Error,
    },
    /// The connection of a new client was closed, because all other clients are busy.
    TooManyClients,
    /// The connection to a client has failed.
    ClientLost {
        /// The reason.
        error: &'a io::Error,
    },
}

/// Receives the events of a control socket. Has to return soon.
pub type ControlObserver = dyn Fn(&ControlEvent<'_>) + Send + Sync;

/// An observer that ignores everything.
pub(super) fn ignore() -> Arc<ControlObserver> {
    Arc::new(|_: &ControlEvent<'_>| {})
}
