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
mod turn;
mod writeback_errors;

use tokio::sync::OwnedSemaphorePermit;

use crate::client;
use crate::clients::Arrival;
use crate::shutdown::{Phase, Shutdown};
use crate::statistics::Tally;
use error::ConnectionError;

pub(crate) use effort::Pauses;
pub(crate) use polling::Slots;
pub(crate) use shared::Shared;
pub(crate) use socket::Socket;
pub(crate) use turn::Thread;

/// A client that was let in.
pub(crate) struct Newcomer<'a> {
    pub(crate) socket: Socket,
    pub(crate) peer: &'a str,
    /// Given back with the greeting.
    pub(crate) ungreeted: Option<OwnedSemaphorePermit>,
}

/// Serves one client until it leaves, misbehaves, or the server ends.
///
/// `thread` counts the connections of this thread, this one included.
pub(crate) async fn serve(
    Newcomer { socket, peer, ungreeted }: Newcomer<'_>,
    shared: Shared,
    mut shutdown: Shutdown,
    thread: Thread,
) {
    let mut draining = shutdown.clone();
    let address = socket.client_address();
    client::record_process(&tracing::Span::current(), &address);
    let deadline = shared.config.handshake_timeout;
    let negotiation =
        tokio::time::timeout(deadline, handshake::negotiate(socket, ungreeted, &shared, &thread));
    let established = tokio::select! {
        result = negotiation => match result {
            Ok(Ok(Some(established))) => established,
            #[cfg(feature = "tls")]
            Ok(Err(ConnectionError::Tls(error))) => {
                // A refused client cannot be told the reason; the administrator needs it.
                return tracing::warn!(%error, "no TLS with a client");
            }
            Ok(Ok(None)) => return tracing::debug!("the client left during the handshake"),
            Ok(Err(error)) => return tracing::info!(%error, "handshake failed"),
            Err(_) => {
                let error = ConnectionError::HandshakeTimeout;
                return tracing::info!(%error, "handshake failed");
            }
        },
        () = draining.reached(Phase::Draining) => return,
    };
    let name = established.negotiated.export_name.clone();
    tracing::Span::current().record("export", tracing::field::debug(&name));
    shared.access.note_use(&name, established.entry.export());
    let tally = Tally::new(established.entry.record(), established.negotiated.size);
    let present = shared.clients.enter(Arrival {
        peer,
        address,
        name: &name,
        export: established.entry.export(),
        counters: tally.counters(),
    });
    let export = established.entry.export();
    if shared.clients.is_withdrawn(export) && !shared.exports.offers(export) {
        // The removal may have disconnected clients before it could see this one.
        return tracing::info!("the export was removed while a client chose it");
    }
    tracing::info!("client connected");
    let agreed = &established.negotiated;
    let contexts: Vec<_> = agreed.meta_contexts.iter().map(|(_, name)| name.as_str()).collect();
    tracing::debug!(size = agreed.size, mode = ?agreed.reply_mode, ?contexts, "negotiated");
    let session = transmission::Session::new(established, &shared, thread, tally);
    tokio::select! {
        result = session.run(draining) => match result {
            Ok(()) => tracing::info!("client disconnected"),
            Err(error) => tracing::warn!(%error, "connection failed"),
        },
        () = present.cut() => tracing::info!("connection cut: the export was removed"),
        () = shutdown.reached(Phase::Aborting) => {
            tracing::warn!("connection cut: the server ended before its replies were taken");
        }
    }
}
