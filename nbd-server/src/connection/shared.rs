//! The shared state of the connections of a server.

use std::sync::Arc;

use super::effort::Pauses;
use crate::access::Access;
use crate::budget::Budget;
use crate::clients::Clients;
use crate::config::ServerConfig;
use crate::export::ExportRegistry;
use crate::paused::Resting;
use crate::ring::RingCounters;
use crate::scheduler::Scheduler;
use crate::slots::Slots;

/// The shared state of all connections of a server.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) exports: ExportRegistry,
    /// Admission of clients, and exports that are resolved by name.
    pub(crate) access: Access,
    /// Counts the clients of exports.
    pub(crate) clients: Clients,
    /// The budget for large requests of all connections.
    pub(crate) budget: Budget,
    /// Threads that may poll.
    pub(crate) slots: Slots,
    /// Threads that may wait for a disk themselves.
    pub(crate) disk_slots: Slots,
    /// Count what the rings of the threads do.
    pub(crate) rings: RingCounters,
    /// Memory for the buffers of busy connections.
    pub(crate) room: Budget,
    /// Memory for long answers to BLOCK_STATUS.
    pub(crate) answers: Budget,
    /// Memory for long options.
    pub(crate) options: Budget,
    /// Pauses of handshakes.
    pub(crate) pauses: Pauses,
    /// Collects connections when the server is paused.
    pub(crate) resting: Resting,
    /// Carries out work that may block.
    pub(crate) scheduler: Scheduler,
}
