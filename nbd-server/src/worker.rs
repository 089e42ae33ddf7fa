//! Threads that serve connections, each with a small runtime of its own.
//!
//! A connection stays on one thread from start to end: waking it never involves another core, and a
//! slow call delays only the connections of its own thread.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::client;
use crate::connection::{self, Newcomer, Shared, Socket, Thread};
use crate::error::{ServeError, system_words};
use crate::paused::Continued;
use crate::ring::{Polling, RingHandle};
use crate::shutdown::Shutdown;
use crate::sys;

/// The precision of pauses, in nanoseconds.
const TIMER_SLACK: NonZeroU64 = NonZeroU64::new(1000).unwrap();

/// An accepted client.
pub(crate) struct Accepted {
    pub(crate) socket: Socket,
    pub(crate) peer: String,
    /// Its permit among the allowed connections.
    pub(crate) place: OwnedSemaphorePermit,
    /// Its permit among those that wait for the greeting; `None` if it needs none.
    pub(crate) ungreeted: Option<OwnedSemaphorePermit>,
    /// A connection that another server has begun.
    pub(crate) continued: Option<Box<Continued>>,
}

/// The threads of a server. They are started when they are needed.
pub(crate) struct Workers {
    workers: Vec<Worker>,
    max: usize,
    shared: Shared,
    shutdown: Shutdown,
}

struct Worker {
    sender: mpsc::UnboundedSender<Accepted>,
    connections: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Workers {
    pub(crate) fn new(max: NonZeroUsize, shared: Shared, shutdown: Shutdown) -> Self {
        Self { workers: Vec::new(), max: max.get(), shared, shutdown }
    }

    /// Gives a client to the thread with the fewest others.
    ///
    /// # Errors
    ///
    /// [`ServeError::Worker`] if no thread can be started and there is none yet.
    pub(crate) fn serve(&mut self, accepted: Accepted) -> Result<(), ServeError> {
        // A panicked thread cannot serve.
        self.workers.retain(|worker| !worker.sender.is_closed());
        let load = |worker: &Worker| worker.connections.load(Ordering::Relaxed);
        let least = self.workers.iter().map(load).min();
        if least != Some(0) && self.workers.len() < self.max {
            match Worker::start(self.workers.len(), self.shared.clone(), self.shutdown.clone()) {
                Ok(worker) => self.workers.push(worker),
                Err(error) if self.workers.is_empty() => return Err(ServeError::Worker(error)),
                Err(error) => {
                    tracing::warn!(error = system_words(&error), "no further worker thread");
                }
            }
        }
        let relaxed = Ordering::Relaxed;
        loop {
            let loads = self.workers.iter().map(|worker| (load(worker), worker));
            let Some((now, worker)) = loads.min_by_key(|(load, _)| *load) else { break };
            // A thread that begins to wait for a disk at this moment does not get the client.
            let chosen = worker.connections.compare_exchange(now, now + 1, relaxed, relaxed);
            if chosen.is_ok() {
                // The receiver exists until this sender is dropped.
                let _ = worker.sender.send(accepted);
                break;
            }
        }
        Ok(())
    }

    /// Waits until every connection has ended. Blocks.
    pub(crate) fn join(self) {
        let threads: Vec<_> = self.workers.into_iter().map(|worker| worker.thread).collect();
        for thread in threads {
            // A panic of a connection is caught by its runtime; the thread itself does nothing
            // else.
            let _ = thread.join();
        }
    }
}

impl Worker {
    fn start(index: usize, shared: Shared, shutdown: Shutdown) -> std::io::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let thread =
            std::thread::Builder::new().name(format!("nbd-worker-{index}")).spawn(move || {
                // The default of 50 microseconds is longer than the pauses in which paced clients
                // are read. If it cannot be set, they are read a little later.
                let _ = rustix::thread::set_current_timer_slack(Some(TIMER_SLACK));
                sys::set_time_slice(sys::SHORTEST_SLICE);
                runtime.block_on(run_with_ring(index, receiver, count, shared, shutdown));
            })?;
        Ok(Self { sender, connections, thread })
    }
}

/// As [`run`], with io_uring if it is available.
async fn run_with_ring(
    index: usize,
    receiver: mpsc::UnboundedReceiver<Accepted>,
    connections: Arc<AtomicUsize>,
    shared: Shared,
    shutdown: Shutdown,
) {
    let thread = Thread::new(Arc::clone(&connections));
    let made = match shared.config.io_uring {
        true => {
            RingHandle::new(shared.rings.of_thread(index)).map_err(|error| system_words(&error))
        }
        false => Err("it was forbidden".into()),
    };
    match made {
        Ok((ring, driver)) => {
            if index == 0 {
                tracing::info!("reads and direct writes that have to wait for a disk use io_uring");
            }
            let may_poll = !shared.config.busy_poll.is_zero();
            let polling = Polling::new(may_poll.then(|| shared.slots.clone()));
            tokio::select! {
                () = run(receiver, thread.with_ring(ring), shared, shutdown) => {}
                () = driver.run(polling) => {}
            }
            driver.end().await;
        }
        Err(reason) => {
            if index == 0 {
                tracing::info!(%reason, "without io_uring: threads read what is not in memory, and write");
            }
            run(receiver, thread, shared, shutdown).await;
        }
    }
}

/// Serves connections until the sender is dropped and the last of them has ended.
async fn run(
    mut receiver: mpsc::UnboundedReceiver<Accepted>,
    thread: Thread,
    shared: Shared,
    shutdown: Shutdown,
) {
    let mut tasks = JoinSet::new();
    let connections = Arc::clone(&thread.connections);
    loop {
        tokio::select! {
            accepted = receiver.recv() => {
                let Some(accepted) = accepted else { break };
                let Accepted { socket, peer, place, ungreeted, continued } = accepted;
                let count = Leaves(Arc::clone(&connections));
                let thread = thread.clone();
                let (shared, shutdown) = (shared.clone(), shutdown.clone());
                let span = client::span(&peer);
                tasks.spawn(async move {
                    // Both are released when the connection ends, also by a panic.
                    let _held = (count, place);
                    match socket.attach() {
                        Ok(socket) => {
                            let newcomer = Newcomer { socket, peer: &peer, ungreeted, continued };
                            connection::serve(newcomer, shared, shutdown, thread).await;
                        },
                        Err(error) => tracing::warn!(error = system_words(&error), "cannot use the socket"),
                    }
                }.instrument(span));
            }
            Some(_) = tasks.join_next() => {}
        }
    }
    while tasks.join_next().await.is_some() {}
}

/// Decrements the number of connections on drop.
struct Leaves(Arc<AtomicUsize>);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
