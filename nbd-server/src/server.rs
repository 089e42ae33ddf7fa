//! [`Server`]: its addresses, hooks and start.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use crate::acceptor::{Acceptor, MOST_UNGREETED};
use crate::access::{Access, Refusal};
use crate::budget::Budget;
use crate::client::ClientInfo;
use crate::clients::Clients;
use crate::config::ServerConfig;
use crate::connection::{Pauses, Shared};
use crate::error::ServeError;
use crate::export::{ExportEntry, ExportRegistry};
use crate::handle::ServerHandle;
use crate::listen_address::{BoundAddress, ListenAddress};
use crate::listener::Listener;
use crate::overview::Gauges;
use crate::paused::{Continued, PausedConnection, PausedListener, Resting, Terms};
use crate::ring::RingCounters;
use crate::running::{Door, Ending, RunningServer};
use crate::scheduler::Scheduler;
use crate::serving::Serving;
use crate::shutdown::ShutdownTrigger;
use crate::slots::Slots;
use crate::worker::Workers;

/// Memory for the buffers of busy connections, in bytes. Connections without a share use small
/// buffers.
const ROOM_LEN: usize = 256 << 20;

/// Memory for long answers to BLOCK_STATUS, of all connections, in bytes. If it is used up, answers
/// are short.
const ANSWERS_LEN: usize = 64 << 20;

/// Memory for options of more than 64 KiB, of all connections, in bytes. Clients that send one when
/// it is used up are disconnected.
const OPTIONS_LEN: usize = 64 << 20;

/// A server that has not started.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    exports: ExportRegistry,
    listeners: Vec<Listener>,
    addresses: Vec<BoundAddress>,
    /// Listeners of a paused server that no address has selected yet.
    adopted: Vec<Listener>,
    /// Connections of a paused server.
    resumed: Vec<(OwnedFd, Continued)>,
    clients: Clients,
    access: Access,
    gauges: Arc<OnceLock<Gauges>>,
}

impl Server {
    /// Creates a server of `exports`, which may change while it runs.
    #[must_use]
    pub fn new(config: ServerConfig, exports: ExportRegistry) -> Self {
        let (listeners, addresses) = (Vec::new(), Vec::new());
        let (clients, access) = (Clients::new(), Access::default());
        let gauges = Arc::default();
        let (adopted, resumed) = (Vec::new(), Vec::new());
        Self { config, exports, listeners, addresses, adopted, resumed, clients, access, gauges }
    }

    /// Sets a hook that is called for each client: when it connects, and again after STARTTLS, when
    /// [`ClientInfo::tls`](crate::ClientInfo) contains its identity. A refused client is
    /// disconnected, and the reason is logged.
    ///
    /// The hook is called on a thread that serves other clients as well: it must not block.
    #[must_use]
    pub fn on_connection(
        mut self,
        hook: impl Fn(&ClientInfo) -> Result<(), Refusal> + Send + Sync + 'static,
    ) -> Self {
        self.access.set_hook(hook);
        self
    }

    /// Sets a resolver for export names that are not in the registry. `None` means that there is no
    /// such export. Lists do not show resolved exports.
    ///
    /// A client may request a name several times in its handshake. For clients that share an
    /// export, return clones of the same entry. The export is flushed at the end if it still
    /// exists.
    ///
    /// The resolver is called on a thread that serves other clients as well: it must not block.
    #[must_use]
    pub fn resolve_exports(
        mut self,
        resolver: impl Fn(&str, &ClientInfo) -> Option<ExportEntry> + Send + Sync + 'static,
    ) -> Self {
        self.access.set_resolver(resolver);
        self
    }

    /// Returns the interface to the running server. Call it before [`Server::serve`] consumes the
    /// server.
    #[must_use]
    pub fn handle(&self) -> ServerHandle {
        let gauges = Arc::clone(&self.gauges);
        ServerHandle::new(self.exports.clone(), self.clients.clone(), gauges)
    }

    /// Listens on `address`; may be called several times. Clients can connect at once, and wait
    /// until [`Server::serve`] runs. A unix socket's file is removed when the server is dropped or
    /// has ended.
    ///
    /// # Errors
    ///
    /// [`ServeError`] if the address is in use, not this machine's, or not permitted. No file
    /// remains then.
    ///
    /// # Cancel safety
    ///
    /// Safe: if the future is dropped, the server does not listen on the address.
    pub async fn listen(
        &mut self,
        address: &ListenAddress,
    ) -> Result<Vec<BoundAddress>, ServeError> {
        let opened = Listener::open(address, &mut self.adopted).await?;
        let mut bound = Vec::with_capacity(opened.len());
        for listener in &opened {
            bound.push(bound_address(listener, &format!("{address:?}"))?);
        }
        self.listeners.extend(opened);
        self.addresses.extend_from_slice(&bound);
        Ok(bound)
    }

    /// Adopts the listening sockets and the connections of a [paused](RunningServer::pause) server.
    /// Call it in a tokio runtime, before [`listen`](Self::listen).
    ///
    /// [`listen`](Self::listen) uses the adopted socket of its address instead of opening another
    /// one. Sockets that a service manager passed are used in any case; their addresses are
    /// returned. All others are closed when the server starts. Until then the files of unix sockets
    /// stay, so that the paused server can be continued.
    ///
    /// A connection continues when the server starts, with the export of the name that its client
    /// requested. If that export does not keep the promises made to the client, if the rules deny
    /// it, or if this server requires TLS, the connection is closed.
    ///
    /// # Errors
    ///
    /// [`ServeError`] if a socket cannot be used.
    pub fn adopt(
        &mut self,
        listeners: Vec<PausedListener>,
        connections: Vec<PausedConnection>,
    ) -> Result<Vec<BoundAddress>, ServeError> {
        let of_new_clients = |PausedConnection { socket, state, .. }| {
            (socket, Continued { state, terms: Terms::OfNewClients })
        };
        self.resumed.extend(connections.into_iter().map(of_new_clients));
        self.adopt_listeners(listeners)
    }

    /// Continues a paused server of this process, with the same registry. Unlike after
    /// [`adopt`](Self::adopt), clients keep what they had. They go on with exports that were
    /// removed from the registry before the pause, and under rules and quotas of connections that
    /// would not let them in again.
    ///
    /// # Errors
    ///
    /// As [`adopt`](Self::adopt).
    pub fn go_on(
        &mut self,
        listeners: Vec<PausedListener>,
        connections: Vec<PausedConnection>,
    ) -> Result<Vec<BoundAddress>, ServeError> {
        let as_before = |PausedConnection { socket, state, unregistered }| {
            (socket, Continued { state, terms: Terms::AsBefore(unregistered) })
        };
        self.resumed.extend(connections.into_iter().map(as_before));
        self.adopt_listeners(listeners)
    }

    fn adopt_listeners(
        &mut self,
        listeners: Vec<PausedListener>,
    ) -> Result<Vec<BoundAddress>, ServeError> {
        let mut passed = Vec::new();
        for listener in listeners {
            let listener = Listener::adopt(listener)?;
            if listener.is_passed() {
                passed.push(bound_address(&listener, "the service manager")?);
                self.listeners.push(listener);
            } else {
                self.adopted.push(listener);
            }
        }
        self.addresses.extend_from_slice(&passed);
        Ok(passed)
    }

    /// Starts to serve on the current runtime, and returns at once. A server without addresses
    /// serves the streams it is [given](RunningServer::serve_connection).
    ///
    /// The runtime needs I/O and time; its blocking threads carry out requests that may block: four
    /// for each core, at least 32 and at most 128.
    ///
    /// # Panics
    ///
    /// If called outside of a tokio runtime.
    #[must_use = "a running server that is dropped shuts down"]
    pub fn start(mut self) -> RunningServer {
        let addresses = std::mem::take(&mut self.addresses);
        let handle = self.handle();
        let (serving, door) = self.begin();
        let (stop, mut stopped) = watch::channel(None);
        let task = tokio::spawn(serving.run(async move {
            let ending = stopped.wait_for(Option::is_some).await;
            // An error means that the owner has dropped the trigger.
            ending.ok().and_then(|ending| *ending).unwrap_or(Ending::Shutdown)
        }));
        RunningServer { addresses, handle, door, stop, task: Some(task) }
    }

    /// Serves until `shutdown` is ready. Then no new client is accepted, every received request is
    /// completed and its reply sent (within [`ServerConfig::drain_timeout`]), all exports are
    /// flushed, and unix sockets are removed.
    ///
    /// Needs a tokio runtime with I/O and time; its blocking threads carry out requests that may
    /// block: four for each core, at least 32 and at most 128.
    ///
    /// # Errors
    ///
    /// [`ServeError::NoListener`] at once; [`ServeError::Worker`] if no thread can be started;
    /// [`ServeError::Flush`] if data may not be durable at the end.
    ///
    /// # Cancel safety
    ///
    /// Not safe: dropping the future closes every connection and flushes nothing.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        if self.listeners.is_empty() {
            return Err(ServeError::NoListener);
        }
        let (serving, _) = self.begin();
        let ending = async {
            shutdown.await;
            Ending::Shutdown
        };
        serving.run(ending).await.map(drop)
    }

    /// Lets clients connect; they wait until [`Serving::run`] takes them.
    fn begin(mut self) -> (Serving, Door) {
        for listener in self.listeners.iter_mut().chain(&mut self.adopted) {
            listener.own_file();
        }
        drop(std::mem::take(&mut self.adopted));
        let resting = Resting::default();
        let trigger = ShutdownTrigger::new();
        let shared = Shared {
            budget: Budget::new(self.config.memory_limit),
            slots: Slots::new(cores() / 2),
            disk_slots: Slots::new(self.config.workers.get() / 2),
            rings: RingCounters::new(self.config.workers.get()),
            exports: self.exports.clone(),
            clients: self.clients,
            access: self.access.clone(),
            room: Budget::new(ROOM_LEN),
            answers: Budget::new(ANSWERS_LEN),
            options: Budget::new(OPTIONS_LEN),
            pauses: Pauses::new(cores()),
            resting: resting.clone(),
            scheduler: Scheduler::new(Handle::current(), cores()),
            config: Arc::new(self.config),
        };
        let config = Arc::clone(&shared.config);
        let (sender, clients) = mpsc::channel(1);
        let mut acceptors = JoinSet::new();
        let places = Arc::new(Semaphore::new(config.max_connections.min(Semaphore::MAX_PERMITS)));
        // Set once, because this consumes the server.
        let _ = self.gauges.set(Gauges::new(&shared, Arc::clone(&places)));
        // Before new clients are admitted.
        let resumed = with_places(self.resumed, &places);
        let ungreeted = Arc::new(Semaphore::new(MOST_UNGREETED));
        for listener in self.listeners {
            let acceptor = Acceptor {
                places: Arc::clone(&places),
                ungreeted: Arc::clone(&ungreeted),
                queue_timeout: config.queue_timeout,
                clients: sender.clone(),
            };
            acceptors.spawn(acceptor.accept(listener, trigger.subscribe()));
        }
        let workers = Workers::new(config.workers, shared, trigger.subscribe());
        let door = Door { places: Arc::clone(&places), clients: sender };
        let (exports, access) = (self.exports, self.access);
        let serving = Serving {
            config,
            exports,
            access,
            trigger,
            workers,
            clients,
            acceptors,
            resting,
            resumed,
        };
        (serving, door)
    }
}

/// Gives connections of a paused server permits. Those without one are closed.
fn with_places(
    connections: Vec<(OwnedFd, Continued)>,
    places: &Arc<Semaphore>,
) -> Vec<(OwnedFd, Continued, OwnedSemaphorePermit)> {
    let count = connections.len();
    let placed: Vec<_> = connections
        .into_iter()
        .map_while(|(socket, continued)| {
            let place = Arc::clone(places).try_acquire_owned().ok()?;
            Some((socket, continued, place))
        })
        .collect();
    if placed.len() < count {
        let closed = count - placed.len();
        tracing::warn!(closed, "connections not continued: the limit of connections is reached");
    }
    placed
}

fn bound_address(listener: &Listener, address: &str) -> Result<BoundAddress, ServeError> {
    let bound = listener.address();
    bound.map_err(|source| ServeError::Bind { address: address.to_owned(), source })
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}
