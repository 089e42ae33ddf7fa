//! The pool of threads for blocking work, and its queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::pace::{self, Pace};
use crate::queue::{Class, Cost, FairQueue, FlowId, GroupId, Limits, Popped, Started};

/// Threads for each core, and in all. A disk with a deep queue wants more than there are cores;
/// beyond some dozens they only wait for each other.
const THREADS_PER_CORE: usize = 4;
const LEAST_THREADS: usize = 32;
const MOST_THREADS: usize = 128;

/// Something to be carried out, in steps of some milliseconds where that is possible.
pub(crate) trait Job: Send {
    /// What the next step is expected to take.
    fn cost(&self) -> Cost;

    /// Whether its result is no longer wanted.
    fn is_abandoned(&self) -> bool {
        false
    }

    /// Carries out a step; what remains comes back. A job that waits for another one submits that
    /// to `scheduler`.
    fn step(self: Box<Self>, scheduler: &Scheduler) -> Option<Box<dyn Job>>;
}

impl std::fmt::Debug for dyn Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

/// The jobs of one server. A clone is the same.
#[derive(Debug, Clone)]
pub(crate) struct Scheduler {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// The runtime whose blocking threads do the work.
    handle: Handle,
    queue: Mutex<FairQueue<Box<dyn Job>>>,
}

/// One connection's place in the queue. What waits there and is [abandoned](Job::is_abandoned) goes
/// when this is dropped.
#[derive(Debug)]
pub(crate) struct Lane {
    scheduler: Scheduler,
    flow: FlowId,
}

impl Scheduler {
    /// A scheduler that uses blocking threads of `handle`.
    pub(crate) fn new(handle: Handle, cores: usize) -> Self {
        let limits = Limits {
            running: cores.saturating_mul(THREADS_PER_CORE).clamp(LEAST_THREADS, MOST_THREADS),
            computing: (cores / 2).max(1),
            bulk: cores.max(LEAST_THREADS / 4),
        };
        let queue = Mutex::new(FairQueue::new(limits));
        Self { inner: Arc::new(Inner { handle, queue }) }
    }

    /// A place in the queue for a connection to the export `group`.
    pub(crate) fn lane(&self, group: GroupId) -> Lane {
        Lane { scheduler: self.clone(), flow: self.queue().open(group) }
    }

    /// Queues a job of an export itself.
    pub(crate) fn submit_own(&self, group: GroupId, job: Box<dyn Job>) {
        let mut queue = self.queue();
        queue.push_own(group, job.cost(), job);
        self.start_ready(queue);
    }

    /// Carries out `work`, which computes for about `estimate` nanoseconds, after all other such
    /// work of `group`. `None` if it panicked.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it has the work left undone unless that has begun.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        group: GroupId,
        estimate: u64,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = oneshot::channel();
        self.submit_own(group, Box::new(Computation { work, sender, estimate }));
        receiver.await.ok()
    }

    /// How many jobs wait, and how many run.
    pub(crate) fn waiting_and_running(&self) -> (usize, usize) {
        let queue = self.queue();
        (queue.waiting(), queue.running())
    }

    /// Starts a thread for each job that may be started.
    fn start_ready(&self, mut queue: MutexGuard<'_, FairQueue<Box<dyn Job>>>) {
        let ready: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        drop(queue);
        for popped in ready {
            let scheduler = self.clone();
            self.inner.handle.spawn_blocking(move || scheduler.run(popped));
        }
    }

    /// Carries out a job, and then others for as long as there are any.
    fn run(&self, first: Popped<Box<dyn Job>>) {
        let mut next = Some(first);
        let pace = JobPace;
        while let Some(Popped { job, started }) = next.take() {
            pace.set(started.class());
            let start = Instant::now();
            // A waiter for a job that panics learns it from the job's destructor.
            let rest = catch_unwind(AssertUnwindSafe(|| job.step(self))).unwrap_or_default();
            let elapsed = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            next = self.finish(started, elapsed, rest);
        }
    }

    fn finish(
        &self,
        started: Started,
        elapsed: u64,
        rest: Option<Box<dyn Job>>,
    ) -> Option<Popped<Box<dyn Job>>> {
        let mut queue = self.queue();
        let (abandoned, rest) = match rest {
            Some(job) if job.is_abandoned() => (Some(job), None),
            rest => (None, rest),
        };
        queue.finish(started, elapsed, rest.map(|job| (job.cost(), job)));
        let next = queue.pop();
        // Threads that are free may have made room for more than one.
        self.start_ready(queue);
        drop(abandoned);
        next
    }

    fn queue(&self) -> MutexGuard<'_, FairQueue<Box<dyn Job>>> {
        self.inner.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pace of a thread that carries out jobs.
struct JobPace;

impl JobPace {
    fn set(&self, class: Class) {
        pace::set(if class == Class::Wait { Pace::Waits } else { Pace::Computes });
    }
}

impl Drop for JobPace {
    fn drop(&mut self) {
        // The thread belongs to the runtime.
        self.set(Class::Wait);
    }
}

/// A job of one step, whose result a waiter gets.
struct Computation<W, T> {
    work: W,
    sender: oneshot::Sender<T>,
    estimate: u64,
}

impl<T: Send, W: FnOnce() -> T + Send> Job for Computation<W, T> {
    fn cost(&self) -> Cost {
        Cost { class: Class::Compute, estimate: self.estimate }
    }

    fn is_abandoned(&self) -> bool {
        self.sender.is_closed()
    }

    fn step(self: Box<Self>, _: &Scheduler) -> Option<Box<dyn Job>> {
        if !self.is_abandoned() {
            let Self { work, sender, .. } = *self;
            // The waiter may have gone in the meantime.
            let _ = sender.send(work());
        }
        None
    }
}

impl Lane {
    /// Queues a job of this connection.
    pub(crate) fn submit(&self, job: Box<dyn Job>) {
        let mut queue = self.scheduler.queue();
        // The flow is closed by this object alone.
        let refused = queue.push(self.flow, job.cost(), job);
        self.scheduler.start_ready(queue);
        drop(refused);
    }

    /// The queue this is a place in.
    pub(crate) fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Their destructors may look at the queue.
        let abandoned = self.scheduler.queue().close(self.flow, |job| job.is_abandoned());
        drop(abandoned);
    }
}
