//! [`Paused`]: the state that a paused server leaves to its successor.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nbd_proto::transmission::SavedConnection;

use crate::error::ServeError;
use crate::export::{Export, ExportEntry, ExportRegistry};

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
    /// Returns the names of exports that clients use and that are not registered any more. No other
    /// process can continue these clients.
    pub fn unregistered(&self) -> impl Iterator<Item = &str> {
        let unregistered = self.connections.iter().filter(|one| one.unregistered.is_some());
        unregistered.map(|connection| &*connection.state.negotiated.export_name)
    }

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
#[non_exhaustive]
pub struct PausedConnection {
    /// The connected socket.
    pub socket: OwnedFd,
    /// The negotiated values, and the received bytes.
    pub state: SavedConnection,
    /// The export that this process served on it, if it is not registered under any name.
    pub(crate) unregistered: Option<ExportEntry>,
}

impl PausedConnection {
    /// A connection of a server in another process.
    #[must_use]
    pub const fn new(socket: OwnedFd, state: SavedConnection) -> Self {
        Self { socket, state, unregistered: None }
    }
}

/// A connection that another server has begun.
#[derive(Debug)]
pub(crate) struct Continued {
    pub(crate) state: SavedConnection,
    pub(crate) terms: Terms,
}

/// What a client that goes on may use.
#[derive(Debug)]
pub(crate) enum Terms {
    /// What a new client may use.
    OfNewClients,
    /// What it used before: this export, or the one of its name.
    AsBefore(Option<ExportEntry>),
}

/// Collects stopped connections. Clones share one collection.
#[derive(Clone, Default)]
pub(crate) struct Resting(Arc<Mutex<Vec<Rested>>>);

struct Rested {
    socket: OwnedFd,
    state: SavedConnection,
    entry: ExportEntry,
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
        socket: OwnedFd,
        state: SavedConnection,
        entry: ExportEntry,
        owes_failure: impl Fn() -> bool + Send + 'static,
    ) {
        let rested = Rested { socket, state, entry, owes_failure: Box::new(owes_failure) };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(rested);
    }

    /// Returns the connections. Call it when all have stopped and everything was flushed except the
    /// exports that have `failed`.
    pub(crate) fn take(
        &self,
        exports: &ExportRegistry,
        failed: &[Arc<dyn Export>],
    ) -> Vec<PausedConnection> {
        let rested = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let registered = exports.entries().into_iter().map(|(_, entry)| entry);
        let entries: Vec<_> =
            registered.chain(rested.iter().map(|rested| rested.entry.clone())).collect();
        for failed in failed {
            // All clients of the disk have to be told.
            if let Some(entry) = entries.iter().find(|entry| Arc::ptr_eq(entry.export(), failed)) {
                entry.failures().add();
            }
        }
        // What fails from here on is told when the connections are continued.
        for entry in &entries {
            entry.failures().pause();
        }
        let settle = |Rested { socket, mut state, entry, owes_failure }| {
            state.owes_failure = owes_failure();
            // By the name of the disk: another server may have another default export.
            let name = name_of(&entry, &state.negotiated.export_name, exports);
            let unregistered = if let Some(name) = name {
                state.negotiated.export_name = name;
                None
            } else {
                Some(entry)
            };
            PausedConnection { socket, state, unregistered }
        };
        rested.into_iter().map(settle).collect()
    }
}

/// A name under which the export of `entry` is registered: the requested one, if possible.
fn name_of(entry: &ExportEntry, requested: &str, exports: &ExportRegistry) -> Option<String> {
    let is_same = |(_, found): &(String, ExportEntry)| Arc::ptr_eq(found.export(), entry.export());
    let found = exports.find(requested).filter(is_same);
    found.or_else(|| exports.entries().into_iter().find(is_same)).map(|(name, _)| name)
}
