//! Who is let in: the limit of connections and those that wait at the door.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::connection::Socket;
use crate::listener::Listener;
use crate::shutdown::{Phase, Shutdown};
use crate::worker::Accepted;

/// How long to wait after the system had no descriptor or memory for a client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Clients of one listener that may wait for a place at a time.
const MAX_WAITING: usize = 64;

/// Lets clients in at one listener.
pub(crate) struct Acceptor {
    pub(crate) places: Arc<Semaphore>,
    /// How long a client may wait for a place.
    pub(crate) queue_deadline: Duration,
    pub(crate) clients: mpsc::Sender<Accepted>,
}

impl Acceptor {
    /// Accepts clients until the server ends. Those that wait then are closed.
    pub(crate) async fn accept(self, listener: Listener, mut shutdown: Shutdown) {
        let mut waiting = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(admitted) = waiting.join_next() => {
                    if let Ok(Some(client)) = admitted
                        && self.clients.send(client).await.is_err()
                    {
                        return;
                    }
                    continue;
                }
                () = shutdown.reached(Phase::Draining) => return,
            };
            match accepted {
                Ok((socket, peer)) => {
                    let Some(client) = self.admit(socket, peer, &mut waiting) else { continue };
                    if self.clients.send(client).await.is_err() {
                        return;
                    }
                }
                Err(error) if is_of_the_client(&error) => tracing::debug!(%error, "accept"),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// A client over the limit waits or is closed: it learns so, and does not wait in vain.
    fn admit(
        &self,
        socket: Socket,
        peer: String,
        waiting: &mut JoinSet<Option<Accepted>>,
    ) -> Option<Accepted> {
        let places = Arc::clone(&self.places);
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            return Some(Accepted { socket, peer, place });
        }
        let deadline = self.queue_deadline;
        if deadline.is_zero() || waiting.len() >= MAX_WAITING {
            tracing::warn!(%peer, "closed a client: the limit of connections is reached");
            return None;
        }
        tracing::info!(%peer, "a client waits: the limit of connections is reached");
        waiting.spawn(async move {
            let place = wait_for_place(places, deadline).await;
            if place.is_none() {
                tracing::warn!(%peer, "closed a client that waited for another one to leave");
            }
            Some(Accepted { socket, peer, place: place? })
        });
        None
    }
}

async fn wait_for_place(
    places: Arc<Semaphore>,
    deadline: Duration,
) -> Option<OwnedSemaphorePermit> {
    tokio::time::timeout(deadline, places.acquire_owned()).await.ok()?.ok()
}

/// Errors of accept(2) that concern one client and not the listener.
fn is_of_the_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}
