//! The order in which the connections of a worker thread work.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Wake, Waker};

use crate::ring::RingHandle;

/// The quantum, in bytes moved: about 200 to 400 microseconds of work.
pub(super) const QUANTUM: usize = 1024 * 1024;
/// The quantum while there are light clients, in bytes moved: about 30 microseconds.
pub(super) const SHORT_QUANTUM: usize = 128 * 1024;
/// The time for which a light connection is remembered, in bytes moved by its thread: for the
/// length of turns, and for decisions about calls that the system may block.
const LIGHT_MEMORY: u64 = 64 << 20;
pub(super) const LONG_LIGHT_MEMORY: u64 = 256 << 20;
/// The maximum head start of an idle connection before the present virtual time, in bytes moved.
pub(super) const HEAD_START: u64 = 2 * SHORT_QUANTUM as u64;

/// The shared state of the connections of one worker thread.
#[derive(Debug, Clone)]
pub(crate) struct Thread {
    /// The number of connections.
    pub(crate) connections: Arc<AtomicUsize>,
    /// Reads data that is not in memory.
    pub(crate) ring: RingHandle,
    /// Locking never waits: only this thread locks it.
    order: Arc<Mutex<Order>>,
}

/// The order of the connections of one thread.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) next_id: u64,
    /// The virtual time at which the latest turn began.
    pub(super) clock: u64,
    /// Connections with work, the one with the least virtual time first.
    pub(super) waiting: BTreeMap<(u64, u64), Waker>,
    /// The connection that was woken for its turn.
    pub(super) chosen: Option<u64>,
    /// The connection that waits until the runtime has polled the sockets.
    pub(super) looker: Option<(u64, Arc<Look>)>,
    /// Work since the last poll of the sockets, and since the last light connection.
    pub(super) since_look: usize,
    pub(super) since_light: u64,
}

impl Thread {
    pub(crate) fn new(connections: Arc<AtomicUsize>) -> Self {
        let order = Order {
            next_id: 0,
            clock: HEAD_START,
            waiting: BTreeMap::new(),
            chosen: None,
            looker: None,
            since_look: 0,
            since_light: u64::MAX,
        };
        let order = Arc::new(Mutex::new(order));
        Self { connections, ring: RingHandle::default(), order }
    }

    pub(crate) fn with_ring(self, ring: RingHandle) -> Self {
        Self { ring, ..self }
    }

    pub(super) fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Order {
    /// The present quantum, in bytes moved.
    pub(super) const fn quantum(&self) -> usize {
        if self.since_light < LIGHT_MEMORY { SHORT_QUANTUM } else { QUANTUM }
    }

    /// Returns whether the runtime has to poll the sockets before any connection continues.
    pub(super) const fn wants_look(&self) -> bool {
        self.since_look >= self.quantum()
    }

    /// Returns whether several connections compete for the thread.
    pub(super) fn is_contended(&self) -> bool {
        self.wants_look() || self.chosen.is_some() || !self.waiting.is_empty()
    }

    /// Charges work, in bytes moved.
    pub(super) fn spend(&mut self, spent: usize) {
        self.since_look = self.since_look.saturating_add(spent);
        self.since_light = self.since_light.saturating_add(spent as u64);
    }

    /// Queues a connection, and wakes the one whose turn it is.
    pub(super) fn wait(&mut self, key: (u64, u64), cx: &mut Context<'_>) {
        self.waiting.insert(key, cx.waker().clone());
        if !self.wants_look() {
            self.wake_next();
        } else if self.looker.is_none() {
            let task = cx.waker().clone();
            let look = Arc::new(Look { is_over: AtomicBool::new(false), task });
            self.looker = Some((key.1, Arc::clone(&look)));
            // The runtime polls the sockets before it wakes yielding tasks, and runs the tasks of
            // ready sockets first.
            let look = Waker::from(look);
            let _ = pin!(tokio::task::yield_now()).poll(&mut Context::from_waker(&look));
        }
    }

    pub(super) fn wake_next(&mut self) {
        if self.chosen.is_some() || self.looker.is_some() {
            return;
        }
        if let Some(((_, id), waker)) = self.waiting.pop_first() {
            self.chosen = Some(id);
            waker.wake();
        }
    }

    /// Forgets a connection that waits.
    pub(super) fn withdraw(&mut self, key: (u64, u64)) {
        self.waiting.remove(&key);
        self.chosen.take_if(|chosen| *chosen == key.1);
        self.looker.take_if(|(looker, _)| *looker == key.1);
    }
}

/// Waits until the runtime has polled the sockets. The task may be woken earlier for other reasons.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) is_over: AtomicBool,
    task: Waker,
}

impl Wake for Look {
    fn wake(self: Arc<Self>) {
        self.is_over.store(true, Ordering::Relaxed);
        self.task.wake_by_ref();
    }
}
