//! The handle through which requests are made.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use nbd_proto::handshake::Negotiated;
use nbd_proto::transmission::Command;
use nbd_proto::wire::{MetaContextId, MetaContextName, ReplyMode, TransmissionFlags};
use tokio::runtime::{self, Handle};
use tokio::sync::oneshot;

use crate::connection::{Caller, Connection};
use crate::dial::{Established, establish_on_its_runtime};
use crate::error::{Error, LostConnection, Result};
use crate::inflight::{Collect, Outcome, Submission};
use crate::info::{ExportInfo, Protocol};
use crate::queue::Message;
use crate::reconnect::{Reconnect, same_export};
use crate::settings::Settings;
use crate::stream::Stream;

/// A connected client.
///
/// Clones share the connections; all methods take `&self` and may be used from many tasks at once.
/// Concurrent requests are sent together, so throughput comes from concurrency. Dropping the last
/// clone ends the connections gracefully in the background; [`Client::disconnect`] waits for the
/// end.
///
/// Requests in flight may overtake each other: a caller that needs an order has to await one
/// request before it makes the next.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    info: ExportInfo,
    protocol: Protocol,
    is_encrypted: bool,
    negotiated: Arc<Negotiated>,
    connections: Vec<Connection>,
    /// Whether the connections belong to several runtimes.
    is_spread: bool,
    next: AtomicUsize,
    /// Whether a request that changes the disk was made; set before it is sent.
    is_changed: Arc<AtomicBool>,
}

impl Client {
    /// Starts the first connection and, if the server allows several, the others.
    pub(crate) async fn start(settings: &Settings, first: Established) -> Result<Self> {
        let negotiated = Arc::new(first.negotiated.clone());
        let protocol = first.details.protocol;
        let info = ExportInfo::new(&negotiated, first.details.clone());
        let target = settings.target();
        let is_encrypted = matches!(first.stream, Stream::Tls(_));
        // An active attacker must not be able to remove a property that the first connection had.
        let requiring_tls = is_encrypted.then(|| settings.requiring_tls());
        let settings = requiring_tls.as_ref().unwrap_or(settings);
        let is_changed = Arc::new(AtomicBool::new(false));
        let connection = |established, contexts, runtime| {
            let reconnect = settings.reconnect.map(|patience| Reconnect {
                settings: settings.clone(),
                patience,
                export: Arc::clone(&negotiated),
                is_changed: Arc::clone(&is_changed),
            });
            Connection::start(
                established,
                contexts,
                settings.limits,
                Arc::clone(&target),
                reconnect,
                runtime,
            )
        };
        let ids: Vec<MetaContextId> = negotiated.meta_contexts.iter().map(|(id, _)| *id).collect();
        let mut connections = vec![connection(first, ids, settings.runtime(0))];
        let multi = TransmissionFlags::CAN_MULTI_CONN;
        if negotiated.flags.contains(multi) {
            while connections.len() < settings.connections.get() {
                let opened = connections.len();
                let further = match establish_on_its_runtime(settings, opened).await {
                    Ok(further) => further,
                    Err(error) => {
                        tracing::warn!(target = &*target, %error, opened, "fewer connections");
                        break;
                    }
                };
                let contexts = same_export(&negotiated, &further.negotiated).map_err(|why| {
                    let reason = LostConnection::ExportChanged(why);
                    Error::Lost { target: Arc::clone(&target), reason }
                })?;
                connections.push(connection(further, contexts, settings.runtime(opened)));
            }
        }
        let next = AtomicUsize::new(0);
        let is_spread = !settings.runtimes.is_empty();
        let shared = Shared {
            info,
            protocol,
            is_encrypted,
            negotiated,
            connections,
            is_spread,
            next,
            is_changed,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Returns true if every connection is protected by TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.shared.is_encrypted
    }

    /// Returns the properties of the export.
    #[must_use]
    pub fn info(&self) -> &ExportInfo {
        &self.shared.info
    }

    /// Returns the kind of handshake that the server uses.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.shared.protocol
    }

    /// Returns the negotiated form of replies.
    #[must_use]
    pub fn reply_mode(&self) -> ReplyMode {
        self.shared.negotiated.reply_mode
    }

    /// Returns the number of connections that were opened.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.len()
    }

    /// Returns the number of lost connections that were replaced so far.
    /// [`Connector::reconnect`](crate::Connector::reconnect) explains the consequence of a change
    /// of this number for data that was not flushed.
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.shared.connections.iter().map(Connection::reconnects).sum()
    }

    /// Returns the requested metadata contexts that the server has, in the order of the request.
    #[must_use]
    pub fn meta_contexts(&self) -> &[MetaContextName] {
        &self.shared.info.meta_contexts
    }

    /// Ends the connections after the requests made before, and waits for the end. Other clones get
    /// [`Error::Closed`] from then on. Nothing is flushed: call [`Client::flush`] first.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if a connection had been lost before, or requests were still unanswered
    /// after 5 s.
    ///
    /// # Cancel safety
    ///
    /// Safe: dropping the future stops the waiting; the connections end in the background.
    pub async fn disconnect(self) -> Result<()> {
        let mut result = Ok(());
        for connection in &self.shared.connections {
            result = result.and(connection.disconnect().await);
        }
        result
    }

    pub(crate) fn negotiated(&self) -> &Negotiated {
        &self.shared.negotiated
    }

    /// Hands a request to the connection with the fewest waiting callers, among those of this
    /// runtime if it has any.
    pub(crate) async fn submit(&self, request: NewRequest) -> Result<PendingReply<'_>> {
        if matches!(
            request.command,
            Command::Write(_) | Command::Trim(_) | Command::WriteZeroes(..)
        ) {
            // Most writes find it set, and leave the cache line to others.
            if !self.shared.is_changed.load(Ordering::Relaxed) {
                self.shared.is_changed.store(true, Ordering::Release);
            }
        }
        let connection = self.pick();
        let caller = connection.enter();
        let (reply, receiver) = oneshot::channel();
        let submission = Submission {
            offset: request.offset,
            length: request.length,
            command: request.command,
            context: request.context,
            payload: request.payload,
            collect: request.collect,
            sent: None,
            refused_since: None,
            reply,
        };
        connection.send(Message::Request(submission)).await?;
        Ok(PendingReply { connection, _caller: caller, receiver })
    }

    fn pick(&self) -> &Connection {
        let connections = &self.shared.connections;
        let [only] = connections.as_slice() else {
            let start = self.shared.next.fetch_add(1, Ordering::Relaxed) % connections.len();
            let (before, from) = connections.split_at(start);
            let candidates = from.iter().chain(before);
            let here = self.shared.is_spread.then(current_runtime).flatten();
            let is_elsewhere =
                |connection: &Connection| here.is_some_and(|here| connection.runtime() != here);
            // A lost connection is chosen only if all are lost, for the sake of its error.
            let best = candidates.min_by_key(|connection| {
                (connection.is_over(), is_elsewhere(connection), connection.load())
            });
            return best.expect("a client has at least one connection");
        };
        only
    }
}

/// The runtime that polls this task.
fn current_runtime() -> Option<runtime::Id> {
    Handle::try_current().ok().map(|runtime| runtime.id())
}

/// A request to be sent.
pub(crate) struct NewRequest {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) command: Command,
    pub(crate) context: Option<usize>,
    pub(crate) payload: Bytes,
    pub(crate) collect: Collect,
}

impl NewRequest {
    /// A request without data in either direction.
    pub(crate) const fn plain(offset: u64, length: u64, command: Command) -> Self {
        let payload = Bytes::new();
        Self { offset, length, command, context: None, payload, collect: Collect::Nothing }
    }
}

/// A request that was handed over. Dropping it abandons the answer, not the connection.
pub(crate) struct PendingReply<'a> {
    connection: &'a Connection,
    _caller: Caller<'a>,
    receiver: oneshot::Receiver<Result<Outcome>>,
}

impl PendingReply<'_> {
    pub(crate) async fn outcome(self) -> Result<Outcome> {
        // A request is dropped without an answer only together with its connection.
        self.receiver.await.unwrap_or_else(|_| Err(self.connection.end()))
    }
}
