//! Threads for copying: each drives some of the connections, and copies what arrives on them.
//!
//! On a runtime of many threads a piece of the disk is received by one thread, stored by another
//! one, and reported to a third. Each step wakes a thread, and moves the piece from the cache of
//! one core to that of another. On a lane all of it happens in one place.

use std::cell::Cell;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinError;

use crate::tasks;

/// Most threads of a job: more wait for each other, at a file or at a server.
const MAX_LANES: usize = 4;

/// Most threads of a lane that wait for disks.
const MAX_WAITING_THREADS: usize = 64;

thread_local! {
    static IS_LANE: Cell<bool> = const { Cell::new(false) };
}

/// The threads of a job. They end after the last clone; a thread inside a system call ends after
/// it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lanes(Arc<Threads>);

#[derive(Debug, Default)]
struct Threads {
    runtimes: Vec<Handle>,
    /// Dropping these ends the threads.
    _stops: Vec<oneshot::Sender<()>>,
}

impl Lanes {
    /// Starts a thread for each core, up to a limit. If the system does not start any, everything
    /// runs on the caller's runtime.
    pub(crate) fn start() -> Self {
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let started = (0..cores.min(MAX_LANES)).map_while(|_| start_one());
        let (runtimes, stops) = started.unzip();
        Self(Arc::new(Threads { runtimes, _stops: stops }))
    }

    /// The runtimes of the threads.
    pub(crate) fn runtimes(&self) -> &[Handle] {
        &self.0.runtimes
    }

    /// The runtime for the task of that number.
    pub(crate) fn runtime(&self, task: usize) -> Handle {
        let lane = task.checked_rem(self.runtimes().len());
        lane.and_then(|lane| self.runtimes().get(lane)).cloned().unwrap_or_else(Handle::current)
    }
}

/// Starts a thread that drives a runtime until the sender is dropped.
fn start_one() -> Option<(Handle, oneshot::Sender<()>)> {
    let (stop, stopped) = oneshot::channel();
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let drive = move || {
        let mut builder = Builder::new_current_thread();
        builder.enable_all().max_blocking_threads(MAX_WAITING_THREADS);
        let Ok(runtime) = builder.build() else { return };
        IS_LANE.set(true);
        if sender.send(runtime.handle().clone()).is_ok() {
            // An error: the sender was dropped, which is what ends the thread.
            let _ = tasks::block_on(&runtime, stopped);
        }
        // A read or write that hangs must not keep the thread.
        runtime.shutdown_background();
    };
    tasks::start_thread("nbd-copy", drive).ok()?;
    Some((receiver.recv().ok()?, stop))
}

/// Returns whether this thread is a lane, which may block for a short time.
pub(crate) fn is_lane() -> bool {
    IS_LANE.get()
}

/// Carries out work that may block for a short time, such as a write into the page cache: in place
/// on a lane, otherwise on a thread for such work.
///
/// # Errors
///
/// The work panicked, or the runtime has ended.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    if is_lane() { Ok(work()) } else { tasks::spawn_blocking(work).await }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_of_a_lane_stays_on_its_thread() {
        let lanes = Lanes::start();
        assert!(!lanes.runtimes().is_empty());
        let here = || thread::current().id();
        let on_lane = lanes.runtime(0).spawn(async move {
            let before = here();
            (before, blocking(here).await.unwrap())
        });
        let (before, inside) = on_lane.await.unwrap();
        assert_eq!(before, inside);
        assert_ne!(blocking(here).await.unwrap(), here(), "elsewhere it must not block the task");
    }

    #[tokio::test]
    async fn the_threads_end_with_the_last_clone() {
        let lanes = Lanes::start();
        let (sender, receiver) = oneshot::channel::<()>();
        let task = lanes.clone().runtime(0).spawn(async move {
            std::future::pending::<()>().await;
            drop(sender);
        });
        drop(lanes);
        assert!(receiver.await.is_err(), "the task was dropped together with its runtime");
        assert!(task.await.unwrap_err().is_cancelled());
    }
}
