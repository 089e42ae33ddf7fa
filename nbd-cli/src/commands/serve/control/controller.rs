//! What the requests of the control socket are carried out on.

use std::sync::atomic::{AtomicU64, Ordering};

use nbd_jobs::control::{ErrorKind, Failure};
use nbd_server::ServerHandle;
use tokio::sync::{Mutex, Notify};

use crate::commands::serve::disks::{ConversationId, Disks};
use crate::serving::image::ImageChoices;

/// The URIs of an export.
pub(in crate::commands::serve) type UrisFn = dyn Fn(&str) -> Vec<String> + Send + Sync;

/// Executes the requests of the control socket, one at a time.
pub(in crate::commands::serve) struct Controller {
    pub(super) server: ServerHandle,
    pub(super) disks: Mutex<Disks>,
    /// Options for opening the images that are added.
    pub(super) choices: ImageChoices,
    pub(super) uris: Box<UrisFn>,
    pub(super) stop: Notify,
    pub(super) conversations: AtomicU64,
}

impl Controller {
    pub(in crate::commands::serve) fn new(
        server: ServerHandle,
        disks: Disks,
        choices: ImageChoices,
        uris: Box<UrisFn>,
    ) -> Self {
        let (disks, stop) = (Mutex::new(disks), Notify::new());
        Self { server, disks, choices, uris, stop, conversations: AtomicU64::new(0) }
    }

    /// Registers a new client of the control socket.
    pub(super) fn new_conversation(&self) -> ConversationId {
        ConversationId(self.conversations.fetch_add(1, Ordering::Relaxed))
    }
}

/// Runs work that may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Failure::new(ErrorKind::Failed, format!("given up: {error}")))
}
