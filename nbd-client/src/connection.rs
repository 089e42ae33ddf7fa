//! One connection of a client: its task and the state that the client sees.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Poll;

use nbd_proto::wire::MetaContextId;
use tokio::runtime::{self, Handle};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::dial::Established;
use crate::driver::Driver;
use crate::error::{Error, LostConnection};
use crate::queue::{Message, QUEUE_LEN, Queue};
use crate::reconnect::{Outage, Reconnect};
use crate::settings::Limits;

/// The client's end of a connection.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: mpsc::Sender<Message>,
    /// The number of waiting callers.
    waiting: AtomicUsize,
    /// The reason for the end of the connection; set before any request fails with it.
    ended: Arc<OnceLock<Error>>,
    /// The number of times the connection was replaced.
    replaced: Arc<AtomicU64>,
    /// The runtime that drives it.
    runtime: runtime::Id,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Connection {
    /// Starts the task of an established connection.
    pub(crate) fn start(
        established: Established,
        contexts: Vec<MetaContextId>,
        limits: Limits,
        target: Arc<str>,
        reconnect: Option<Reconnect>,
        runtime: Option<&Handle>,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_LEN);
        let ended = Arc::new(OnceLock::new());
        let mut driver = Driver::new(established, contexts, limits);
        if let Some(reconnect) = &reconnect {
            driver = driver.replaced_for(reconnect.patience);
        }
        let replaced = Arc::default();
        let task = Task {
            queue: Queue::new(receiver),
            ended: Arc::clone(&ended),
            replaced: Arc::clone(&replaced),
            target,
            reconnect,
        };
        let runtime = runtime.cloned().unwrap_or_else(Handle::current);
        let task = Mutex::new(Some(runtime.spawn(task.run(driver))));
        let runtime = runtime.id();
        Self { sender, waiting: AtomicUsize::new(0), ended, replaced, runtime, task }
    }

    /// Queues a message and waits for room if necessary.
    pub(crate) async fn send(&self, message: Message) -> Result<(), Error> {
        self.sender.send(message).await.map_err(|_| self.end())
    }

    /// Returns the reason for the end of the connection.
    pub(crate) fn end(&self) -> Error {
        self.ended.get().cloned().unwrap_or(Error::Closed)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.sender.is_closed()
    }

    /// Returns the number of times the connection was replaced by a new one.
    pub(crate) fn reconnects(&self) -> u64 {
        self.replaced.load(Ordering::Acquire)
    }

    /// Returns the number of callers that wait for this connection.
    pub(crate) fn load(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Returns the runtime that drives this connection.
    pub(crate) fn runtime(&self) -> runtime::Id {
        self.runtime
    }

    /// Counts a caller during the life of the value.
    pub(crate) fn enter(&self) -> Caller<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Caller(&self.waiting)
    }

    /// Ends the connection after the queued requests, and waits for the end.
    pub(crate) async fn disconnect(&self) -> Result<(), Error> {
        // A connection that has ended needs no message.
        drop(self.sender.send(Message::Disconnect).await);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            // The task catches its own failures; it can only disappear together with its runtime.
            drop(task.await);
        }
        match self.end() {
            Error::Closed => Ok(()),
            error => Err(error),
        }
    }
}

/// One waiting caller.
pub(crate) struct Caller<'a>(&'a AtomicUsize);

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The task of a connection.
struct Task {
    queue: Queue,
    ended: Arc<OnceLock<Error>>,
    replaced: Arc<AtomicU64>,
    target: Arc<str>,
    reconnect: Option<Reconnect>,
}

impl Task {
    async fn run(mut self, mut driver: Driver) {
        let mut outage: Option<Outage> = None;
        loop {
            let over = poll_fn(|cx| driver.poll(cx, &mut self.queue)).await;
            let Err(lost) = over else { return self.end(Error::Closed) };
            tracing::debug!(target = &*self.target, reason = %lost, "connection lost");
            if driver.has_answered() {
                outage = None;
            }
            for submission in driver.into_unanswered().into_iter().rev() {
                self.queue.put_back(submission);
            }
            let may_help = |reconnect: &&Reconnect| {
                reconnect.may_help(&lost) || lost.is_transient() && reconnect.goes_on()
            };
            let Some(reconnect) = self.reconnect.as_ref().filter(may_help) else {
                return self.lost(lost);
            };
            // A lost connection does no harm before there is a request for it.
            if outage.is_none() && !self.queue.wait().await {
                return self.end(Error::Closed);
            }
            let outage = outage.get_or_insert_with(|| Outage::begin(&lost));
            let mut next = match reconnect.may_help(&lost) {
                true => next_driver(&mut self.queue, reconnect.again(outage, lost)).await,
                false => Some(Err(lost)),
            };
            while let Some(Err(lost)) = &next
                && reconnect.goes_on()
            {
                let reason = lost.clone();
                let (target, lost) = (Arc::clone(&self.target), reason.clone());
                self.queue.fail_waiting(&Error::Lost { target, reason });
                if !self.queue.wait().await {
                    return self.end(Error::Closed);
                }
                next = next_driver(&mut self.queue, reconnect.once_more(outage, lost)).await;
            }
            driver = match next {
                Some(Ok(driver)) => {
                    // Before any answer of the new connection, so that every caller with an answer
                    // sees the number.
                    self.replaced.fetch_add(1, Ordering::Release);
                    driver
                }
                Some(Err(lost)) => return self.lost(lost),
                None => return self.end(Error::Closed),
            };
        }
    }

    fn lost(self, reason: LostConnection) {
        let target = Arc::clone(&self.target);
        self.end(Error::Lost { target, reason });
    }

    fn end(self, error: Error) {
        self.queue.fail(self.ended.get_or_init(|| error));
    }
}

/// Waits for a new connection while any request needs one.
async fn next_driver<F: Future>(queue: &mut Queue, again: F) -> Option<F::Output> {
    let mut again = pin!(again);
    poll_fn(|cx| match again.as_mut().poll(cx) {
        Poll::Ready(next) => Poll::Ready(Some(next)),
        Poll::Pending => queue.poll_abandoned(cx).map(|()| None),
    })
    .await
}
