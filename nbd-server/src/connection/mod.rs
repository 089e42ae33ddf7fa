//! One client, from its first byte to its last.

mod answer;
mod coalescing;
mod dispatch;
mod durability;
mod effort;
mod handshake;
mod hangup;
mod polling;
mod pool;
mod read_steps;
mod read_strategy;
mod receive;
mod room;
mod send;
mod socket;
mod stall;
mod steps;
#[cfg(feature = "tls")]
mod tls;
mod transmission;
mod turn;
mod writeback_errors;

use std::sync::Arc;

use thiserror::Error;
use tokio::sync::OwnedSemaphorePermit;

use crate::ServerConfig;
use crate::access::{Access, Refusal};
use crate::budget::Budget;
use crate::clients::Clients;
use crate::error::system_words;
use crate::export::ExportRegistry;
use crate::scheduler::Scheduler;
use crate::shutdown::{Phase, Shutdown};

pub(crate) use effort::Pauses;
pub(crate) use polling::PollSlots;
pub(crate) use socket::Socket;
pub(crate) use turn::Thread;

/// What all connections of a server share.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) exports: ExportRegistry,
    /// Who is let in, and what exports there are besides.
    pub(crate) access: Access,
    /// Counts those that have an export in use.
    pub(crate) clients: Clients,
    /// Large requests of all connections.
    pub(crate) budget: Budget,
    /// Threads that may poll.
    pub(crate) slots: PollSlots,
    /// Memory for the buffers of busy connections.
    pub(crate) room: Budget,
    /// Memory for long answers to BLOCK_STATUS.
    pub(crate) answers: Budget,
    /// Memory for long options.
    pub(crate) options: Budget,
    /// Pauses of handshakes.
    pub(crate) pauses: Pauses,
    /// Carries out what may block.
    pub(crate) scheduler: Scheduler,
}

/// Why a connection ended that should not have.
#[derive(Debug, Error)]
pub(crate) enum ConnectionError {
    #[error(transparent)]
    Protocol(#[from] nbd_proto::ProtocolError),
    #[cfg(feature = "tls")]
    #[error(transparent)]
    Tls(#[from] tls::TlsFailure),
    #[error("{}", system_words(.0))]
    Io(#[from] std::io::Error),
    #[error("long options of other clients hold all the memory there is for them")]
    LongOptions,
    #[error("answering an option panicked")]
    Panicked,
    #[error("the client did not finish its handshake in time")]
    HandshakeTimeout,
    #[error("the client {awaiting}, and nothing has moved for {} s", .limit.as_secs_f32())]
    Stalled { awaiting: stall::Awaiting, limit: std::time::Duration },
    #[error("the client closed the connection without waiting for its replies")]
    HungUp,
    #[error("the client was refused: {0}")]
    Refused(Refusal),
    #[error("a file ended while it was being sent; its size changed behind our back")]
    FileTruncated,
}

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
    let deadline = shared.config.handshake_timeout;
    let negotiation =
        tokio::time::timeout(deadline, handshake::negotiate(socket, ungreeted, &shared, &thread));
    let established = tokio::select! {
        result = negotiation => match result {
            Ok(Ok(Some(established))) => established,
            #[cfg(feature = "tls")]
            Ok(Err(ConnectionError::Tls(error))) => {
                // Who is turned away cannot be told why; the owner of the server has to know.
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
    shared.access.note_use(&name, established.entry.export());
    let present = shared.clients.enter(peer, &name, established.entry.export());
    let export = established.entry.export();
    if shared.clients.is_withdrawn(export) && !shared.exports.offers(export) {
        // Whoever cut its clients may not have seen this one.
        return tracing::info!(export = ?name, "the export was removed while a client chose it");
    }
    tracing::info!(export = ?established.negotiated.export_name, "client connected");
    let agreed = &established.negotiated;
    let contexts: Vec<_> = agreed.meta_contexts.iter().map(|(_, name)| name.as_str()).collect();
    tracing::debug!(size = agreed.size, mode = ?agreed.reply_mode, ?contexts, "negotiated");
    let session = transmission::Session::new(established, &shared, thread);
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
