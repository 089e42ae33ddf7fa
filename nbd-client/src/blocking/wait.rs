//! Blocks a thread until another thread has finished its work.

use std::future::poll_fn;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use tokio::runtime::{Builder, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::unconstrained;

use crate::Client;
use crate::connector::Connector;
use crate::error::{Error, Result};

/// Cancels blocking calls, for example from a Ctrl-C handler or another thread.
///
/// Clones share one state. Once one is used, every blocked call fails with [`Error::Interrupted`],
/// and so does every later one; whether requests in flight are carried out is unknown.
#[derive(Debug, Clone)]
pub struct Interrupter {
    reason: Arc<watch::Sender<Option<Arc<str>>>>,
}

impl Default for Interrupter {
    fn default() -> Self {
        Self::new()
    }
}

impl Interrupter {
    /// Creates an interrupter in the initial state: nothing is interrupted.
    #[must_use]
    pub fn new() -> Self {
        Self { reason: Arc::new(watch::Sender::new(None)) }
    }

    /// Interrupts all calls. `reason` is the text of the errors; only the first one is kept.
    pub fn interrupt(&self, reason: &str) {
        self.reason.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert_with(|| reason.into());
            is_first
        });
    }

    /// Returns true once [`Interrupter::interrupt`] was called.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.reason.borrow().is_some()
    }

    async fn interrupted(&self) -> Error {
        let mut reason = self.reason.subscribe();
        match reason.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone()) {
            Some(reason) => Error::Interrupted { reason },
            // This object holds a sender.
            None => std::future::pending().await,
        }
    }
}

/// Blocks this thread until a future driven by another thread is complete.
pub(super) fn wait<T>(
    interrupter: &Interrupter,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    // A task of a tokio runtime has a budget, which is not renewed while the thread stays here.
    let mut work = pin!(unconstrained(work));
    let mut interrupted = pin!(unconstrained(interrupter.interrupted()));
    loop {
        if let Poll::Ready(result) = work.as_mut().poll(&mut cx) {
            return result;
        }
        if let Poll::Ready(error) = interrupted.as_mut().poll(&mut cx) {
            return Err(error);
        }
        thread::park();
    }
}

/// Wakes a parked thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

/// The thread that drives a client's connections. Dropping this ends the connections and the
/// thread.
#[derive(Debug)]
pub(super) struct Driver {
    _stop: oneshot::Sender<()>,
}

impl Driver {
    /// Connects on a new thread.
    pub(super) fn start(
        connector: &Connector,
        interrupter: &Interrupter,
    ) -> Result<(Client, Self)> {
        let (sender, connected) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let connector = connector.clone();
        // The runtime is created and dropped there: an asynchronous task must not drop one.
        let driving = move || match runtime(connector.settings.connections) {
            Ok(runtime) => runtime.block_on(drive(connector, sender, stopped)),
            Err(error) => drop(sender.send(Err(error))),
        };
        let thread = thread::Builder::new().name(THREAD_NAME.to_owned()).spawn(driving);
        thread.map_err(|error| Error::NoThread(Arc::new(error)))?;
        // Without an answer the thread has ended, for example by a panic.
        let client = wait(interrupter, async { connected.await.unwrap_or(Err(Error::Closed)) })?;
        Ok((client, Self { _stop: stop }))
    }
}

const THREAD_NAME: &str = "nbd-client";

async fn drive(
    connector: Connector,
    mut sender: oneshot::Sender<Result<Client>>,
    stopped: oneshot::Receiver<()>,
) {
    let mut connecting = pin!(connector.connect());
    let connected = poll_fn(|cx| match connecting.as_mut().poll(cx) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        // The caller was interrupted.
        Poll::Pending => sender.poll_closed(cx).map(|()| None),
    });
    match connected.await {
        Some(Ok(client)) => {
            if sender.send(Ok(client.clone())).is_ok() {
                // The sender sends nothing: it is dropped.
                drop(stopped.await);
            }
            // No receiver is left for the result.
            drop(client.disconnect().await);
        }
        Some(Err(error)) => drop(sender.send(Err(error))),
        None => {}
    }
}

/// Runs `work` on a new thread, also if this thread belongs to a runtime.
pub(super) fn run<T: Send>(
    connections: NonZeroUsize,
    work: impl Future<Output = Result<T>> + Send,
) -> Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(THREAD_NAME.to_owned());
        let thread = thread.spawn_scoped(scope, || runtime(connections)?.block_on(work));
        let thread = thread.map_err(|error| Error::NoThread(Arc::new(error)))?;
        thread.join().unwrap_or(Err(Error::Closed))
    })
}

/// The number of threads that can run at once.
fn runtime(connections: NonZeroUsize) -> Result<Runtime> {
    let processors = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let mut builder = match connections.min(processors).get() {
        1 => Builder::new_current_thread(),
        threads => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    };
    builder.thread_name(THREAD_NAME).enable_io().enable_time();
    builder.build().map_err(|error| Error::NoThread(Arc::new(error)))
}
