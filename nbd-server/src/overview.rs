//! [`ServerStatistics`]: the past and present work of a complete server.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::Semaphore;

use crate::budget::Budget;
use crate::clients::{ClientStatistics, Clients};
use crate::connection::Shared;
use crate::export::ExportRegistry;
use crate::ring::{RingCounters, RingStatistics};
use crate::scheduler::Scheduler;
use crate::statistics::ExportStatistics;

/// The work of a server since its start, and at present.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerStatistics {
    /// The time of the start; `None` before that.
    pub since: Option<SystemTime>,
    /// Number of present connections, including those that have not selected an export.
    pub connections: usize,
    /// The limit of connections.
    pub max_connections: usize,
    /// The requests in the pool of threads, without those that io_uring carries out.
    pub pool: PoolStatistics,
    /// The reads and writes that io_uring carries out.
    pub ring: RingStatistics,
    /// The registered exports by name. Resolved exports are not included; their requests are
    /// counted for their clients.
    pub exports: BTreeMap<String, ExportStatistics>,
    /// The clients that have selected an export, in the order of their arrival.
    pub clients: Vec<ClientStatistics>,
}

/// The pool of threads for requests that may block, and the memory of large requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStatistics {
    /// Requests that wait for a thread.
    pub waiting: usize,
    /// Requests that threads carry out.
    pub running: usize,
    /// Bytes of [`ServerConfig::memory_limit`](crate::ServerConfig::memory_limit) in use.
    pub memory: u64,
    /// Bytes of the buffers of busy connections.
    pub buffers: u64,
}

/// The sources of a running server's statistics.
#[derive(Debug)]
pub(crate) struct Gauges {
    since: SystemTime,
    places: Arc<Semaphore>,
    max_connections: usize,
    scheduler: Scheduler,
    budget: Budget,
    room: Budget,
    rings: RingCounters,
}

impl Gauges {
    /// For a server that starts now; `places` are the permits for its connections.
    pub(crate) fn new(shared: &Shared, places: Arc<Semaphore>) -> Self {
        Self {
            since: SystemTime::now(),
            max_connections: places.available_permits(),
            places,
            scheduler: shared.scheduler.clone(),
            budget: shared.budget.clone(),
            room: shared.room.clone(),
            rings: shared.rings.clone(),
        }
    }

    fn pool(&self) -> PoolStatistics {
        let (waiting, running) = self.scheduler.waiting_and_running();
        let (memory, buffers) = (self.budget.taken(), self.room.taken());
        PoolStatistics { waiting, running, memory, buffers }
    }

    fn connections(&self) -> usize {
        self.max_connections.saturating_sub(self.places.available_permits())
    }
}

impl ServerStatistics {
    pub(crate) fn collect(
        gauges: Option<&Gauges>,
        exports: &ExportRegistry,
        clients: &Clients,
    ) -> Self {
        let entries = exports.entries().into_iter();
        Self {
            since: gauges.map(|gauges| gauges.since),
            connections: gauges.map_or(0, Gauges::connections),
            max_connections: gauges.map_or(0, |gauges| gauges.max_connections),
            pool: gauges.map(Gauges::pool).unwrap_or_default(),
            ring: gauges.map(|gauges| gauges.rings.statistics()).unwrap_or_default(),
            exports: entries.map(|(name, entry)| (name, entry.statistics())).collect(),
            clients: clients.statistics(),
        }
    }
}
