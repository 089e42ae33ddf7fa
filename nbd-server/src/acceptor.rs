//! Admission control: the limit of connections and the queue of pending ones.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::connection::Socket;
use crate::error::system_words;
use crate::listener::Listener;
use crate::log_limit::may_warn;
use crate::shutdown::{Phase, Shutdown};
use crate::worker::Accepted;

/// The pause after the system had no descriptor or memory for a client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Maximum number of clients of one listener that wait for a place.
const MAX_WAITING: usize = 64;

/// Number of clients that are admitted at once, and that are added in each [`REFILL`]. A client
/// that connects and leaves repeatedly costs the server more than itself.
const MOST_AT_ONCE: u32 = 64;
const MORE: u32 = 8;
const REFILL: Duration = Duration::from_millis(1);

/// Maximum number of accepted connections of a server without a greeting. Other clients stay in the
/// system's queue, because accepted ones that have left would take the places of others.
pub(crate) const MOST_UNGREETED: usize = 64;

/// Admits clients at one listener.
pub(crate) struct Acceptor {
    pub(crate) places: Arc<Semaphore>,
    /// Limits the connections without a greeting.
    pub(crate) ungreeted: Arc<Semaphore>,
    /// The time for which a client may wait for a place.
    pub(crate) queue_timeout: Duration,
    pub(crate) clients: mpsc::Sender<Accepted>,
}

impl Acceptor {
    /// Accepts clients until the server ends or pauses, and returns the listener. Clients that
    /// still wait for a place are then closed.
    pub(crate) async fn accept(self, listener: Listener, mut shutdown: Shutdown) -> Listener {
        let mut waiting = JoinSet::new();
        let mut rate = AcceptRate::new(Instant::now());
        loop {
            let next = async {
                // The semaphore is never closed.
                let ungreeted = Arc::clone(&self.ungreeted).acquire_owned().await.ok();
                while !rate.has_room(Instant::now()) {
                    tokio::time::sleep(REFILL).await;
                }
                (listener.accept().await, ungreeted)
            };
            let (accepted, ungreeted) = tokio::select! {
                accepted = next => accepted,
                Some(admitted) = waiting.join_next() => {
                    if let Ok(Some(client)) = admitted
                        && self.clients.send(client).await.is_err()
                    {
                        return listener;
                    }
                    continue;
                }
                () = shutdown.reached(Phase::Pausing) => return listener,
            };
            match accepted {
                Ok((socket, peer)) => {
                    rate.take();
                    let newcomer = Newcomer { socket, peer, ungreeted };
                    let Some(client) = self.admit(newcomer, &mut waiting) else { continue };
                    if self.clients.send(client).await.is_err() {
                        return listener;
                    }
                }
                Err(error) if is_of_the_client(&error) => tracing::debug!(%error, "accept"),
                Err(error) => {
                    if may_warn() {
                        tracing::warn!(
                            error = system_words(&error),
                            "cannot accept a client; trying again"
                        );
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Admits a client, or lets it wait, or closes it if it cannot wait.
    fn admit(
        &self,
        newcomer: Newcomer,
        waiting: &mut JoinSet<Option<Accepted>>,
    ) -> Option<Accepted> {
        let Newcomer { socket, peer, ungreeted } = newcomer;
        let places = Arc::clone(&self.places);
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            return Some(Accepted { socket, peer, place, ungreeted, continued: None });
        }
        let deadline = self.queue_timeout;
        if deadline.is_zero() || waiting.len() >= MAX_WAITING {
            if may_warn() {
                tracing::warn!(%peer, "closed a client: the limit of connections is reached");
            }
            return None;
        }
        tracing::info!(%peer, "a client waits: the limit of connections is reached");
        waiting.spawn(async move {
            let place = wait_for_place(places, deadline).await;
            if place.is_none() && may_warn() {
                tracing::warn!(%peer, "closed a client that waited for another one to leave");
            }
            Some(Accepted { socket, peer, place: place?, ungreeted: None, continued: None })
        });
        None
    }
}

/// An accepted client without a place.
struct Newcomer {
    socket: Socket,
    peer: String,
    ungreeted: Option<OwnedSemaphorePermit>,
}

/// The number of clients that may be admitted now.
#[derive(Debug)]
struct AcceptRate {
    room: u32,
    since: Instant,
}

impl AcceptRate {
    const fn new(now: Instant) -> Self {
        Self { room: MOST_AT_ONCE, since: now }
    }

    fn has_room(&mut self, now: Instant) -> bool {
        let refills = now.saturating_duration_since(self.since).as_nanos() / REFILL.as_nanos();
        if refills > 0 {
            let more = u32::try_from(refills).unwrap_or(u32::MAX).saturating_mul(MORE);
            self.room = self.room.saturating_add(more).min(MOST_AT_ONCE);
            self.since = now;
        }
        self.room > 0
    }

    const fn take(&mut self) {
        self.room = self.room.saturating_sub(1);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_is_let_in_at_once_and_a_flood_at_a_pace() {
        let start = Instant::now();
        let mut rate = AcceptRate::new(start);
        let mut let_in = |now| {
            let mut count = 0;
            while rate.has_room(now) {
                rate.take();
                count += 1;
            }
            count
        };
        assert_eq!(let_in(start), MOST_AT_ONCE);
        assert_eq!(let_in(start + REFILL / 2), 0);
        assert_eq!(let_in(start + REFILL), MORE);
        assert_eq!(let_in(start + 1000 * REFILL), MOST_AT_ONCE, "no more than that is saved up");
    }
}
