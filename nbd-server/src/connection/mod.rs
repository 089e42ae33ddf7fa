//! One client, from its first byte to its last.

mod answer;
mod catalog;
mod coalescing;
mod dispatch;
mod durability;
mod effort;
mod error;
mod handshake;
mod hangup;
mod plain;
mod polling;
mod pool;
mod read_steps;
mod read_strategy;
mod receive;
mod request_job;
mod resume;
mod ring_work;
mod room;
mod send;
mod shared;
mod socket;
mod stall;
mod steps;
#[cfg(test)]
mod tests;
#[cfg(feature = "tls")]
mod tls;
mod transmission;
mod trial;
mod turn;
mod unix_socket;
mod writeback_errors;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

use crate::client;
use crate::clients::Arrival;
use crate::error::system_words;
use crate::export::{Export, ExportEntry, ExportError, Waiter};
use crate::log_limit::may_warn;
use crate::paused::Continued;
use crate::queue::GroupId;
use crate::shutdown::{Phase, Shutdown};
use crate::statistics::Tally;
use error::ConnectionError;
use handshake::Established;
use transmission::Rest;

pub(crate) use effort::Pauses;
pub(crate) use shared::Shared;
pub(crate) use socket::Socket;
pub(crate) use turn::Thread;

/// An admitted client.
pub(crate) struct Newcomer<'a> {
    pub(crate) socket: Socket,
    pub(crate) peer: &'a str,
    /// Released with the greeting.
    pub(crate) ungreeted: Option<OwnedSemaphorePermit>,
    /// A connection that another server has begun.
    pub(crate) continued: Option<Box<Continued>>,
}

/// Time for handshakes that are in progress when the server is paused.
const HANDSHAKE_GRACE: Duration = Duration::from_millis(250);

/// Serves one client until it leaves, misbehaves, or the server ends.
///
/// `thread` counts the connections of this thread, this one included.
pub(crate) async fn serve(
    newcomer: Newcomer<'_>,
    shared: Shared,
    mut shutdown: Shutdown,
    thread: Thread,
) {
    let ending = shutdown.clone();
    let (peer, socket) = (newcomer.peer, &newcomer.socket);
    let address = socket.client_address();
    client::record_process(&tracing::Span::current(), &address);
    let established = establish(newcomer, &shared, ending.clone(), &thread).await;
    let Some(established) = established else { return };
    let name = established.negotiated.export_name.clone();
    tracing::Span::current().record("export", tracing::field::debug(&name));
    shared.access.note_use(&name, established.granted.entry.export());
    let tally = Tally::new(established.granted.entry.record(), established.negotiated.size);
    let present = shared.clients.enter(Arrival {
        peer,
        address,
        name: &name,
        export: established.granted.entry.export(),
        counters: tally.counters(),
    });
    let export = established.granted.entry.export();
    if is_withdrawn(export, &shared) {
        // The removal may have disconnected clients before this one was counted.
        return tracing::info!("the export was removed while a client chose it");
    }
    tracing::info!("client connected");
    let entry = established.granted.entry.clone();
    let agreed = &established.negotiated;
    let contexts: Vec<_> = agreed.meta_contexts.iter().map(|(_, name)| name.as_str()).collect();
    tracing::debug!(size = agreed.size, mode = ?agreed.reply_mode, ?contexts, "negotiated");
    let session = transmission::Session::new(established, &shared, thread, tally);
    tokio::select! {
        result = session.run(ending) => match result {
            Ok(None) => tracing::info!("client disconnected"),
            Ok(Some(_)) if is_withdrawn(entry.export(), &shared) => {
                tracing::info!("connection cut: the export was removed");
            }
            Ok(Some(Rest { socket, state, writeback })) => match socket.into_descriptor() {
                Ok(socket) => {
                    let entry = entry.clone();
                    shared.resting.add(socket, state, entry, move || writeback.owes_failure());
                }
                Err(error) => tracing::warn!(error = system_words(&error), "connection failed"),
            },
            Err(error) if may_warn() => tracing::warn!(%error, "connection failed"),
            Err(error) => tracing::debug!(%error, "connection failed"),
        },
        () = present.cut() => tracing::info!("connection cut: the export was removed"),
        () = shutdown.reached(Phase::Aborting) => {
            tracing::warn!("connection cut: the server ended before its replies were taken");
        }
    }
    drop(present);
    // At its end the server flushes everything.
    if shutdown.is_in(Phase::Serving) {
        leave(entry, &name, &shared);
    }
}

/// Has an export flushed, if it was removed and its last client has left: nobody else does so. It
/// is dropped after that, on a thread of the pool, because closing a disk may take long.
fn leave(entry: ExportEntry, name: &str, shared: &Shared) {
    let export = entry.export();
    let is_removed = !shared.exports.offers(export) && !shared.clients.is_withdrawn(export);
    if is_removed && shared.clients.users_of(export) == 0 {
        let group = Arc::as_ptr(export).cast::<()>() as GroupId;
        let last = Box::new(LastFlush(name.to_owned()));
        entry.flushes().join(&shared.scheduler, group, export, entry.failures(), last);
    }
}

/// Reports a failed flush in the log: no client is there any more.
struct LastFlush(String);

impl Waiter for LastFlush {
    fn is_abandoned(&self) -> bool {
        false
    }

    fn answer(self: Box<Self>, result: Result<(), (u64, &ExportError)>) {
        if let Err((_, error)) = result {
            tracing::error!(export = %self.0, message = %error.message, "the last flush of a removed export failed");
        }
    }
}

/// Whether the export was removed and its clients are disconnected.
fn is_withdrawn(export: &Arc<dyn Export>, shared: &Shared) -> bool {
    shared.clients.is_withdrawn(export) && !shared.exports.offers(export)
}

/// The result of the handshake, or of an earlier one; `None` if the connection is over.
async fn establish(
    newcomer: Newcomer<'_>,
    shared: &Shared,
    mut ending: Shutdown,
    thread: &Thread,
) -> Option<Established> {
    let Newcomer { socket, ungreeted, continued, .. } = newcomer;
    if let Some(continued) = continued {
        let name = continued.state.negotiated.export_name.clone();
        let resumed = resume::resume(socket, *continued, shared);
        return resumed
            .inspect_err(|error| tracing::warn!(export = ?name, %error, "connection not continued"))
            .ok();
    }
    let deadline = shared.config.handshake_timeout;
    let negotiation =
        tokio::time::timeout(deadline, handshake::negotiate(socket, ungreeted, shared, thread));
    let mut pausing = ending.clone();
    let grace = async {
        pausing.reached(Phase::Pausing).await;
        tokio::time::sleep(HANDSHAKE_GRACE).await;
    };
    tokio::select! {
        result = negotiation => match result {
            Ok(Ok(Some(established))) => return Some(established),
            #[cfg(feature = "tls")]
            Ok(Err(ConnectionError::Tls(error))) if may_warn() => {
                // A refused client does not get the reason; the administrator needs it.
                tracing::warn!(%error, "no TLS with a client");
            }
            Ok(Ok(None)) => tracing::debug!("the client left during the handshake"),
            Ok(Err(error)) => tracing::info!(%error, "handshake failed"),
            Err(_) => {
                let error = ConnectionError::HandshakeTimeout;
                tracing::info!(%error, "handshake failed");
            }
        },
        () = grace => {}
        () = ending.reached(Phase::Draining) => {}
    }
    None
}
