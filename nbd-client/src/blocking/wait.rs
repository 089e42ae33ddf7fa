//! Blocks a thread until another thread has finished its work.

use std::future::poll_fn;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::unconstrained;

use crate::client::Client;
use crate::connector::Connector;
use crate::error::{Error, Result};

/// Cancels blocking calls, for example from a Ctrl-C handler or another thread.
///
/// Clones share one state. Once one is used, every blocked call fails with [`Error::Interrupted`],
/// and so does every later one; whether requests in flight are carried out is unknown.
#[derive(Debug, Clone)]
pub struct Interrupter {
    state: Arc<watch::Sender<State>>,
}

#[derive(Debug, Default)]
struct State {
    reason: Option<Arc<str>>,
    limit: Option<(Duration, Arc<str>)>,
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
        Self { state: Arc::new(watch::Sender::new(State::default())) }
    }

    /// Interrupts all calls. `reason` is the text of the errors; only the first one is kept.
    pub fn interrupt(&self, reason: &str) {
        self.state.send_if_modified(|state| {
            let is_first = state.reason.is_none();
            state.reason.get_or_insert_with(|| reason.into());
            is_first
        });
    }

    /// Limits the time of every call from now on; for calls that are blocked already the time
    /// begins now. A call that takes longer fails with `reason`, and then so does every later call
    /// of the same client at once, because its server hangs. Other clients go on. Only the first
    /// limit is kept.
    ///
    /// For the end of a program: what servers still answer is completed, and what hangs is given
    /// up.
    pub fn limit_calls(&self, limit: Duration, reason: &str) {
        self.state.send_if_modified(|state| {
            let is_first = state.limit.is_none();
            state.limit.get_or_insert_with(|| (limit, reason.into()));
            is_first
        });
    }

    /// Returns true once [`Interrupter::interrupt`] was called.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.state.borrow().reason.is_some()
    }

    async fn interrupted(&self) -> Error {
        let mut state = self.state.subscribe();
        let is_interrupted = state.wait_for(|state| state.reason.is_some()).await;
        match is_interrupted.ok().and_then(|state| state.reason.clone()) {
            Some(reason) => Error::Interrupted { reason },
            // This object holds a sender.
            None => std::future::pending().await,
        }
    }
}

/// The server of a client, until it is given up.
#[derive(Debug)]
pub(super) struct Awaited {
    /// The server, for the log.
    uri: String,
    /// A call has taken longer than the [limit](Interrupter::limit_calls).
    hangs: AtomicBool,
}

impl Awaited {
    /// Blocks this thread until a future driven by another thread is complete.
    pub(super) fn wait<T>(
        &self,
        interrupter: &Interrupter,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut cx = Context::from_waker(&waker);
        // A task of a tokio runtime has a budget, which is not renewed while the thread stays here.
        let mut work = pin!(unconstrained(work));
        let mut interrupted = pin!(unconstrained(interrupter.interrupted()));
        let mut limited_since = None;
        if self.hangs.load(Ordering::Relaxed) {
            // Nothing more is sent to it: it might be carried out much later.
            self.park(interrupter, &mut limited_since)?;
        }
        loop {
            if let Poll::Ready(result) = work.as_mut().poll(&mut cx) {
                return result;
            }
            if let Poll::Ready(error) = interrupted.as_mut().poll(&mut cx) {
                return Err(error);
            }
            self.park(interrupter, &mut limited_since)?;
        }
    }

    /// Parks this thread, as long as there is time for the call.
    fn park(&self, interrupter: &Interrupter, since: &mut Option<Instant>) -> Result<()> {
        let Some((limit, reason)) = interrupter.state.borrow().limit.clone() else {
            thread::park();
            return Ok(());
        };
        let passed = since.get_or_insert_with(Instant::now).elapsed();
        if passed >= limit && !self.hangs.swap(true, Ordering::Relaxed) {
            tracing::error!(server = %self.uri, %reason, "a request was given up after {limit:?}");
        }
        if self.hangs.load(Ordering::Relaxed) {
            return Err(Error::Interrupted { reason });
        }
        thread::park_timeout(limit - passed);
        Ok(())
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
    pub(super) server: Awaited,
}

impl Driver {
    /// Connects on a new thread.
    pub(super) fn start(
        connector: &Connector,
        interrupter: &Interrupter,
    ) -> Result<(Client, Self)> {
        let (sender, connected) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let server = Awaited { uri: connector.uri().to_string(), hangs: AtomicBool::default() };
        let connector = connector.clone();
        // The runtime is created and dropped there: an asynchronous task must not drop one.
        let driving = move || match runtime(connector.settings.connections) {
            Ok(runtime) => runtime.block_on(drive(connector, sender, stopped)),
            Err(error) => drop(sender.send(Err(error))),
        };
        let thread = thread::Builder::new().name(THREAD_NAME.to_owned()).spawn(driving);
        thread.map_err(|error| Error::NoThread(Arc::new(error)))?;
        // Without an answer the thread has ended, for example by a panic.
        let connected = async { connected.await.unwrap_or(Err(Error::Closed)) };
        let client = server.wait(interrupter, connected)?;
        Ok((client, Self { _stop: stop, server }))
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
