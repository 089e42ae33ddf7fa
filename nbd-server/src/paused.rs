//! [`Paused`]: the state that a paused server leaves to its successor.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nbd_proto::transmission::SavedConnection;

use crate::ServeError;

/// The state of a [paused](crate::RunningServer::pause) server, for a server that
/// [adopts](crate::Server::adopt) it, in this process or in another one.
///
/// Dropping it closes the connections and the listening sockets; the files of unix sockets stay.
#[derive(Debug)]
#[non_exhaustive]
pub struct Paused {
    /// The listening sockets. Clients that connect now wait.
    pub listeners: Vec<PausedListener>,
    /// The connections without TLS that had selected an export. All others have ended.
    pub connections: Vec<PausedConnection>,
    /// Whether all exports were flushed. If not, keep them open if possible, because another
    /// process would not know of the lost data.
    pub flushed: Result<(), ServeError>,
}

impl Paused {
    /// The state of a server that has ended.
    pub(crate) const fn nothing() -> Self {
        Self { listeners: Vec::new(), connections: Vec::new(), flushed: Ok(()) }
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct PausedListener {
    /// The listening socket.
    pub socket: OwnedFd,
    /// Its origin.
    pub origin: ListenerOrigin,
}

/// The origin of a listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenerOrigin {
    /// A server opened it at a TCP address.
    Tcp,
    /// A server created its file, and removes it when it ends.
    UnixFile {
        /// Absolute path of the file.
        path: PathBuf,
        /// Device and inode number of the file: another file of that name is not removed.
        identity: (u64, u64),
    },
    /// A service manager passed it.
    ServiceManager,
}

/// A connection between two requests.
#[derive(Debug)]
pub struct PausedConnection {
    /// The connected socket.
    pub socket: OwnedFd,
    /// The negotiated values, and the received bytes.
    pub state: SavedConnection,
}

/// Collects stopped connections. Clones share one collection.
#[derive(Clone, Default)]
pub(crate) struct Resting(Arc<Mutex<Vec<Rested>>>);

struct Rested {
    connection: PausedConnection,
    owes_failure: Box<dyn Fn() -> bool + Send>,
}

impl std::fmt::Debug for Resting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resting").finish_non_exhaustive()
    }
}

impl Resting {
    /// A flush for another connection may still fail, and consume the error of this one's data.
    /// Therefore `owes_failure` is called when all connections have stopped.
    pub(crate) fn add(
        &self,
        connection: PausedConnection,
        owes_failure: impl Fn() -> bool + Send + 'static,
    ) {
        let rested = Rested { connection, owes_failure: Box::new(owes_failure) };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(rested);
    }

    /// Returns the connections. Call it when all have stopped and everything was flushed.
    pub(crate) fn take(&self) -> Vec<PausedConnection> {
        let rested = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let settle = |Rested { mut connection, owes_failure }| {
            connection.state.owes_failure |= owes_failure();
            connection
        };
        rested.into_iter().map(settle).collect()
    }
}
