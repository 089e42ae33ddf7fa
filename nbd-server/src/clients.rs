//! The clients of each export, and their number.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use tokio::sync::{Notify, watch};

use crate::client::ClientAddress;
use crate::export::Export;
use crate::statistics::{Counters, RequestStatistics};

/// Counts clients that have selected an export, now and in total. Clones count for the same server.
///
/// A client that leaves before it has selected one (a port scan, a query for the list of exports)
/// is never counted.
///
/// A server for one job ends when its last client has left:
///
/// ```
/// # use std::sync::Arc;
/// # use nbd_server::export::{ExportEntry, MemoryExport};
/// # use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// # let exports = ExportRegistry::new();
/// # exports.add("", ExportEntry::new(Arc::new(MemoryExport::new(1 << 20))))?;
/// let mut server = Server::new(ServerConfig::default(), exports);
/// server.listen(&ListenAddress::Tcp("127.0.0.1:10809".into())).await?;
/// let mut server = server.start();
/// server.handle().client_count().wait_until_unused().await;
/// server.shutdown();
/// server.wait().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct ClientCount {
    count: watch::Receiver<Count>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    present: usize,
    total: u64,
}

impl ClientCount {
    /// Returns the number of clients that use an export now.
    #[must_use]
    pub fn present(&self) -> usize {
        self.count.borrow().present
    }

    /// Returns the number of clients that have ever used an export.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.count.borrow().total
    }

    /// Waits until at least one client has used an export and none uses one any more. If the server
    /// ends before that, this never returns.
    ///
    /// # Cancel safety
    ///
    /// Safe: no count is lost, because the server keeps it.
    pub async fn wait_until_unused(&mut self) {
        let left = |count: &Count| count.total > 0 && count.present == 0;
        let server_is_gone = self.count.wait_for(left).await.is_err();
        if server_is_gone {
            std::future::pending::<()>().await;
        }
    }
}

/// A client that has selected an export.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectedClient {
    /// Identifies the client; never reused by one server.
    pub id: u64,
    /// The client's address, as text.
    pub peer: String,
    /// The client's address, or its process.
    pub address: ClientAddress,
    /// The name under which it requested its export; empty for the default export.
    pub export: String,
    /// The time at which it selected the export.
    pub since: SystemTime,
}

/// The address, and the process of a client on a unix socket.
impl fmt::Display for ConnectedClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.peer)?;
        let ClientAddress::Unix { process, user, .. } = &self.address else { return Ok(()) };
        if let Some(process) = process {
            write!(f, ", process {process}")?;
        }
        write!(f, ", user {user}")
    }
}

/// A client and what it has done.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientStatistics {
    /// The client.
    pub client: ConnectedClient,
    /// Its answered requests.
    pub requests: RequestStatistics,
    /// Requests that are not answered yet.
    pub in_flight: u64,
}

/// A client that has selected an export, before it is counted.
pub(crate) struct Arrival<'a> {
    pub(crate) peer: &'a str,
    pub(crate) address: ClientAddress,
    /// The name of the export.
    pub(crate) name: &'a str,
    pub(crate) export: &'a Arc<dyn Export>,
    pub(crate) counters: &'a Arc<Counters>,
}

/// The counting side, which knows the connected clients.
#[derive(Debug, Clone)]
pub(crate) struct Clients {
    count: Arc<watch::Sender<Count>>,
    roster: Arc<Mutex<Roster>>,
}

#[derive(Debug, Default)]
struct Roster {
    next: u64,
    present: BTreeMap<u64, Entry>,
    /// Exports whose clients are being disconnected, including a client that has selected one and
    /// is not counted yet.
    withdrawn: Vec<Weak<dyn Export>>,
}

#[derive(Debug)]
struct Entry {
    client: ConnectedClient,
    /// Address of the export, which lives while the client uses it.
    used: usize,
    cut: Arc<Notify>,
    counters: Arc<Counters>,
}

impl Clients {
    pub(crate) fn new() -> Self {
        Self { count: Arc::new(watch::Sender::new(Count::default())), roster: Arc::default() }
    }

    pub(crate) fn subscribe(&self) -> ClientCount {
        ClientCount { count: self.count.subscribe() }
    }

    /// Counts a client until the returned value is dropped.
    pub(crate) fn enter(&self, arrival: Arrival<'_>) -> PresentClient {
        let Arrival { peer, address: from, name, export: used, counters } = arrival;
        let cut = Arc::new(Notify::new());
        let mut roster = self.roster();
        let id = roster.next;
        roster.next += 1;
        let (peer, export) = (peer.to_owned(), name.to_owned());
        let since = SystemTime::now();
        let client = ConnectedClient { id, peer, address: from, export, since };
        let (used, counters) = (address(used), Arc::clone(counters));
        let entry = Entry { client, used, cut: Arc::clone(&cut), counters };
        roster.present.insert(id, entry);
        drop(roster);
        self.count.send_modify(|count| {
            count.present += 1;
            count.total += 1;
        });
        PresentClient { clients: self.clone(), id, cut }
    }

    /// The connected clients, in the order of their arrival.
    pub(crate) fn list(&self) -> Vec<ConnectedClient> {
        self.roster().present.values().map(|entry| entry.client.clone()).collect()
    }

    /// The statistics of the connected clients.
    pub(crate) fn statistics(&self) -> Vec<ClientStatistics> {
        let roster = self.roster();
        let entries = roster.present.values().map(|entry| {
            let (client, requests) = (entry.client.clone(), entry.counters.requests());
            ClientStatistics { client, requests, in_flight: entry.counters.in_flight() }
        });
        entries.collect()
    }

    /// The number of clients of an export.
    pub(crate) fn users_of(&self, export: &Arc<dyn Export>) -> usize {
        let used = address(export);
        self.roster().present.values().filter(|entry| entry.used == used).count()
    }

    /// Whether the users of an export were disconnected.
    pub(crate) fn is_withdrawn(&self, export: &Arc<dyn Export>) -> bool {
        let used = address(export);
        // A weak reference keeps its address from being reused for another export.
        let is_same =
            |withdrawn: &Weak<dyn Export>| withdrawn.as_ptr().cast::<()>() as usize == used;
        self.roster().withdrawn.iter().any(is_same)
    }

    /// Ends the connections that use an export, and waits until they have ended.
    pub(crate) async fn cut_users_of(&self, export: &Arc<dyn Export>) {
        self.withdraw(export);
        let mut count = self.count.subscribe();
        // This object is a sender: the channel is open.
        let _ = count.wait_for(|_| self.users_of(export) == 0).await;
    }

    fn withdraw(&self, export: &Arc<dyn Export>) {
        let used = address(export);
        let mut roster = self.roster();
        roster.withdrawn.retain(|withdrawn| withdrawn.strong_count() > 0);
        roster.withdrawn.push(Arc::downgrade(export));
        for entry in roster.present.values().filter(|entry| entry.used == used) {
            entry.cut.notify_one();
        }
    }

    fn roster(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn address(export: &Arc<dyn Export>) -> usize {
    Arc::as_ptr(export).cast::<()>() as usize
}

/// A counted client.
#[derive(Debug)]
pub(crate) struct PresentClient {
    clients: Clients,
    id: u64,
    cut: Arc<Notify>,
}

impl PresentClient {
    /// Waits until this client is to be disconnected.
    pub(crate) async fn cut(&self) {
        self.cut.notified().await;
    }
}

impl Drop for PresentClient {
    fn drop(&mut self) {
        self.clients.roster().present.remove(&self.id);
        self.clients.count.send_modify(|count| count.present -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::MemoryExport;

    fn export() -> Arc<dyn Export> {
        Arc::new(MemoryExport::new(1024))
    }

    fn enter(clients: &Clients, name: &str, export: &Arc<dyn Export>) -> PresentClient {
        let (address, counters) = (ClientAddress::Unknown, &Arc::new(Counters::new(1024)));
        clients.enter(Arrival { peer: "", address, name, export, counters })
    }

    #[tokio::test]
    async fn only_the_users_of_one_export_are_cut() {
        let clients = Clients::new();
        let (one, other) = (export(), export());
        let first = enter(&clients, "one", &one);
        let second = enter(&clients, "other", &other);
        let names: Vec<_> = clients.list().into_iter().map(|client| client.export).collect();
        assert_eq!(names, ["one", "other"]);
        let cutting = tokio::spawn({
            let (clients, one) = (clients.clone(), Arc::clone(&one));
            async move { clients.cut_users_of(&one).await }
        });
        first.cut().await;
        assert!(!cutting.is_finished(), "it is still there");
        drop(first);
        cutting.await.unwrap();
        assert_eq!((clients.users_of(&one), clients.users_of(&other)), (0, 1));
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(1), second.cut());
        assert!(waiting.await.is_err(), "nobody wants it to be gone");
    }

    #[tokio::test]
    async fn the_last_one_leaves_when_there_was_one() {
        let clients = Clients::new();
        let mut count = clients.subscribe();
        let first = enter(&clients, "", &export());
        let second = enter(&clients, "", &export());
        assert_eq!((count.present(), count.total()), (2, 2));
        drop(first);
        let waiting = tokio::spawn(async move {
            count.wait_until_unused().await;
            (count.present(), count.total())
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "one client is still there");
        drop(second);
        assert_eq!(waiting.await.unwrap(), (0, 2));
    }

    #[tokio::test]
    async fn a_server_nobody_has_used_yet_has_not_been_left() {
        let clients = Clients::new();
        let mut count = clients.subscribe();
        let waiting = tokio::spawn(async move { count.wait_until_unused().await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(enter(&clients, "", &export()));
        waiting.await.unwrap();
    }
}
