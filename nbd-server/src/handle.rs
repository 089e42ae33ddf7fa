//! [`ServerHandle`]: inspects a running server and changes its exports.

use std::sync::{Arc, OnceLock};

use crate::clients::{ClientCount, Clients, ConnectedClient};
use crate::export::{ExportEntry, ExportRegistry};
use crate::overview::{Gauges, ServerStatistics};

/// The treatment of clients that use an export to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InUse {
    /// The export is not removed.
    Refuse,
    /// Their connections are closed. Unsent replies are lost, as in a network failure.
    Disconnect,
}

/// The reason why an export was not removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RemoveError {
    /// There is no export of that name.
    #[error("there is no export named '{0}'")]
    NotFound(String),
    /// Clients use it.
    #[error("{} using the export '{name}'", clients_are(*clients))]
    InUse {
        /// The export's name.
        name: String,
        /// Number of clients.
        clients: usize,
    },
}

fn clients_are(count: usize) -> String {
    if count == 1 { "a client is".to_owned() } else { format!("{count} clients are") }
}

/// The owner's interface to a running server. Clones refer to the same server.
#[derive(Debug, Clone)]
pub struct ServerHandle {
    exports: ExportRegistry,
    clients: Clients,
    /// Set when the server has started.
    gauges: Arc<OnceLock<Gauges>>,
}

impl ServerHandle {
    pub(crate) const fn new(
        exports: ExportRegistry,
        clients: Clients,
        gauges: Arc<OnceLock<Gauges>>,
    ) -> Self {
        Self { exports, clients, gauges }
    }

    /// Returns the exports, which may be changed.
    #[must_use]
    pub const fn exports(&self) -> &ExportRegistry {
        &self.exports
    }

    /// Returns the clients that use an export, in the order of their arrival.
    #[must_use]
    pub fn clients(&self) -> Vec<ConnectedClient> {
        self.clients.list()
    }

    /// Returns the numbers of clients, now and in total, which also lets the caller wait for the
    /// last client to leave.
    #[must_use]
    pub fn client_count(&self) -> ClientCount {
        self.clients.subscribe()
    }

    /// Returns the past and present work of the server. The numbers are read one after the other
    /// while clients continue, so they may differ by a few requests.
    ///
    /// Takes the locks of the scheduler, the exports and the clients for a moment. The time grows
    /// with the number of clients: about a microsecond for each.
    #[must_use]
    pub fn statistics(&self) -> ServerStatistics {
        ServerStatistics::collect(self.gauges.get(), &self.exports, &self.clients)
    }

    /// Returns the number of clients that use an export.
    #[must_use]
    pub fn users_of(&self, entry: &ExportEntry) -> usize {
        self.clients.users_of(entry.export())
    }

    /// Removes an export and returns it: on return no connection uses it any more, and no new one
    /// can. A request that a thread is carrying out for a closed connection may still be in
    /// progress.
    ///
    /// # Errors
    ///
    /// See [`RemoveError`]; nothing has changed then.
    ///
    /// # Cancel safety
    ///
    /// Not safe: the export may or may not be removed, and connections that were told to end do so
    /// in any case.
    pub async fn remove_export(
        &self,
        name: &str,
        in_use: InUse,
    ) -> Result<ExportEntry, RemoveError> {
        let not_found = || RemoveError::NotFound(name.to_owned());
        if in_use == InUse::Refuse {
            let entries = self.exports.entries();
            let found = entries.iter().find(|(found, _)| found == name);
            let (_, entry) = found.ok_or_else(not_found)?;
            self.refuse_if_used(name, entry)?;
        }
        let entry = self.exports.remove(name).ok_or_else(not_found)?;
        if in_use == InUse::Refuse
            && let Err(error) = self.refuse_if_used(name, &entry)
        {
            // A client has arrived in between. Only a second caller can have taken the name; its
            // export then stays.
            let _ = self.exports.add(name, entry);
            return Err(error);
        }
        self.clients.cut_users_of(entry.export()).await;
        Ok(entry)
    }

    fn refuse_if_used(&self, name: &str, entry: &ExportEntry) -> Result<(), RemoveError> {
        match self.users_of(entry) {
            0 => Ok(()),
            clients => Err(RemoveError::InUse { name: name.to_owned(), clients }),
        }
    }
}
