//! [`RunningServer`]: the owner's side of a running server.

use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::connection::Socket;
use crate::error::ServeError;
use crate::handle::ServerHandle;
use crate::listen_address::BoundAddress;
use crate::listener::prepare_tcp;
use crate::overview::ServerStatistics;
use crate::paused::Paused;
use crate::worker::Accepted;

/// A connected stream for [`RunningServer::serve_connection`].
#[derive(Debug)]
#[non_exhaustive]
pub enum ClientStream {
    /// A TCP connection.
    Tcp(TcpStream),
    /// A unix socket, which may be one end of a socket pair.
    Unix(UnixStream),
}

impl From<TcpStream> for ClientStream {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl From<UnixStream> for ClientStream {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(stream)
    }
}

/// The reason why a stream is not served. The stream is closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionRefused {
    /// The limit [`ServerConfig::max_connections`](crate::ServerConfig::max_connections) is
    /// reached.
    #[error("the limit of connections is reached")]
    LimitReached,
    /// The server is shutting down or has ended.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The stream cannot be used.
    #[error("the stream cannot be used: {0}")]
    Unusable(#[from] io::Error),
}

/// The way in which a server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Permanently.
    Shutdown,
    /// To be continued by another server.
    Pause,
}

/// Passes the caller's streams to the workers.
#[derive(Debug, Clone)]
pub(crate) struct Door {
    pub(crate) places: Arc<Semaphore>,
    pub(crate) clients: mpsc::Sender<Accepted>,
}

impl Door {
    async fn let_in(&self, stream: ClientStream) -> Result<(), ConnectionRefused> {
        let places = Arc::clone(&self.places);
        let place = places.try_acquire_owned().map_err(|_| ConnectionRefused::LimitReached)?;
        let socket = match stream {
            ClientStream::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                prepare_tcp(&stream)?;
                Socket::from_std_tcp(stream)
            }
            ClientStream::Unix(stream) => {
                stream.set_nonblocking(true)?;
                Socket::from_std_unix(stream)
            }
        };
        let client =
            Accepted { peer: socket.peer_name(), socket, place, ungreeted: None, continued: None };
        self.clients.send(client).await.map_err(|_| ConnectionRefused::ShuttingDown)
    }
}

/// A running server, returned by [`Server::start`](crate::Server::start).
///
/// Dropping it shuts the server down cleanly, like [`shutdown`](Self::shutdown).
#[derive(Debug)]
pub struct RunningServer {
    pub(crate) addresses: Vec<BoundAddress>,
    pub(crate) handle: ServerHandle,
    pub(crate) door: Door,
    pub(crate) stop: watch::Sender<Option<Ending>>,
    /// `None` once it has ended.
    pub(crate) task: Option<JoinHandle<Result<Option<Paused>, ServeError>>>,
}

impl RunningServer {
    /// Returns the addresses the server listens on, in the order in which they were added.
    #[must_use]
    pub fn addresses(&self) -> &[BoundAddress] {
        &self.addresses
    }

    /// Returns the interface for inspecting the server and changing its exports.
    #[must_use]
    pub const fn handle(&self) -> &ServerHandle {
        &self.handle
    }

    /// Returns the work of the server; see [`ServerHandle::statistics`].
    #[must_use]
    pub fn statistics(&self) -> ServerStatistics {
        self.handle.statistics()
    }

    /// Serves a client on a stream of the caller: a connection accepted elsewhere, or one end of a
    /// socket pair. Returns when a worker has the stream. The client has the same limits as any
    /// other.
    ///
    /// # Errors
    ///
    /// [`ConnectionRefused`]; the stream is closed then.
    ///
    /// # Cancel safety
    ///
    /// Not safe: a dropped future has either closed the stream or handed it to a worker.
    pub async fn serve_connection(
        &self,
        stream: impl Into<ClientStream>,
    ) -> Result<(), ConnectionRefused> {
        self.door.let_in(stream.into()).await
    }

    /// Shuts the server down: it accepts no more clients, completes the requests that it has
    /// received, within [`ServerConfig::drain_timeout`](crate::ServerConfig::drain_timeout),
    /// flushes all exports and removes its unix sockets. Returns at once; [`wait`](Self::wait)
    /// waits for the end. Further calls have no effect.
    pub fn shutdown(&self) {
        self.stop.send_replace(Some(Ending::Shutdown));
    }

    /// Waits until the server has ended, after [`shutdown`](Self::shutdown) or by an error. Returns
    /// `Ok` when called again.
    ///
    /// # Errors
    ///
    /// [`ServeError::Worker`] if no thread could be started; [`ServeError::Flush`] if data may not
    /// be durable; [`ServeError::RuntimeShutDown`] if the runtime on which the server was started
    /// has ended before it.
    ///
    /// # Panics
    ///
    /// If the task of the server panicked: the panic continues here.
    ///
    /// # Cancel safety
    ///
    /// Safe: the server continues, and can be waited for again.
    pub async fn wait(&mut self) -> Result<(), ServeError> {
        self.join().await.map(drop)
    }

    /// Pauses the server: it accepts no more clients, answers the requests that it has begun within
    /// [`ServerConfig::drain_timeout`](crate::ServerConfig::drain_timeout), begins no others, and
    /// flushes all exports. Its listening sockets and connections are returned, for a server that
    /// [adopts](crate::Server::adopt) them: clients notice a pause. That server may be in another
    /// process, which receives the descriptors over a unix socket.
    ///
    /// Connections with TLS end as at a [`shutdown`](Self::shutdown), and so do those that have not
    /// selected an export after a moment. Connections whose clients do not receive their replies in
    /// time are cut. The exports stay in the registry; threads may still work on requests of cut
    /// connections.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait), if the server has ended before. A failed flush is not an error
    /// here; [`Paused::flushed`] reports it.
    ///
    /// # Cancel safety
    ///
    /// Not safe: if the future is dropped, all connections are closed, and files of unix sockets
    /// may remain.
    pub async fn pause(mut self) -> Result<Paused, ServeError> {
        self.stop.send_replace(Some(Ending::Pause));
        // It may have been shut down before.
        self.join().await.map(|paused| paused.unwrap_or_else(Paused::nothing))
    }

    async fn join(&mut self) -> Result<Option<Paused>, ServeError> {
        let Some(task) = &mut self.task else { return Ok(None) };
        let ended = task.await;
        self.task = None;
        match ended {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // Only the end of the runtime cancels the task.
                Err(_) => Err(ServeError::RuntimeShutDown),
            },
        }
    }
}
