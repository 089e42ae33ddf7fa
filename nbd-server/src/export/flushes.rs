//! Flushes of one export, shared by concurrent requests.
//!
//! A flush makes all data durable that was written before it began. So a flush answers all requests
//! that arrived before it began: however many clients request a flush, one runs and one waits.
//! Requests that arrive while it runs are answered by the next.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nbd_proto::wire::Errno;

use crate::export::{Export, ExportError};
use crate::queue::{Class, Cost, GroupId};
use crate::scheduler::{Job, Scheduler};

/// The expected time of a flush, in nanoseconds.
const ESTIMATE: u64 = 2_000_000;

/// A flush that runs for longer has more to write than the data of its waiters.
const SLOW: Duration = Duration::from_millis(100);

/// Counts the failures of an export to make writes durable.
#[derive(Debug, Clone, Default)]
pub(crate) struct DurabilityFailures {
    count: Arc<AtomicU64>,
    at_pause: Arc<AtomicU64>,
    syncs: Arc<Mutex<Syncs>>,
}

/// The calls under way that make single changes durable.
#[derive(Default)]
struct Syncs {
    next: u64,
    running: BTreeSet<u64>,
    /// What is done when no call with a smaller number is running.
    deferred: Vec<(u64, Box<dyn FnOnce() + Send>)>,
}

impl std::fmt::Debug for Syncs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Syncs").field("running", &self.running).finish_non_exhaustive()
    }
}

/// A call that makes a single change durable. It is over when this is dropped; a failure has to be
/// counted before.
#[derive(Debug)]
pub(crate) struct OwnSync {
    syncs: Arc<Mutex<Syncs>>,
    number: u64,
}

impl Drop for OwnSync {
    fn drop(&mut self) {
        let mut syncs = self.syncs.lock().unwrap_or_else(PoisonError::into_inner);
        syncs.running.remove(&self.number);
        let first = syncs.running.first().copied().unwrap_or(u64::MAX);
        let ready: Vec<_> = syncs.deferred.extract_if(.., |(limit, _)| *limit <= first).collect();
        drop(syncs);
        for (_, then) in ready {
            then();
        }
    }
}

impl DurabilityFailures {
    /// Begins a call that makes a single change durable. It may take the error of other data, which
    /// the system reports once.
    pub(crate) fn begin_sync(&self) -> OwnSync {
        let mut syncs = self.syncs.lock().unwrap_or_else(PoisonError::into_inner);
        let number = syncs.next;
        syncs.next += 1;
        syncs.running.insert(number);
        OwnSync { syncs: Arc::clone(&self.syncs), number }
    }

    /// Does something when all such calls that have begun until now are over, and their failures
    /// counted: now, or on the thread that ends the last of them.
    fn after_syncs(&self, then: impl FnOnce() + Send + 'static) {
        let mut syncs = self.syncs.lock().unwrap_or_else(PoisonError::into_inner);
        if !syncs.running.is_empty() {
            let limit = syncs.next;
            return syncs.deferred.push((limit, Box::new(then)));
        }
        drop(syncs);
        then();
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Counts a failure, and returns the count.
    pub(crate) fn add(&self) -> u64 {
        self.count.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Called when the server is paused, before its connections are saved with the failures so far.
    pub(crate) fn pause(&self) {
        self.at_pause.store(self.count(), Ordering::Release);
    }

    /// Whether a failure was added since the pause, so that a saved connection does not know of it.
    pub(crate) fn are_more_since_pause(&self) -> bool {
        self.count() > self.at_pause.load(Ordering::Acquire)
    }
}

/// A request that waits for a flush. If it is dropped without an answer, it has to answer itself.
pub(crate) trait Waiter: Send {
    /// Returns whether the answer is no longer needed.
    fn is_abandoned(&self) -> bool;

    /// Called after the flush. The number of an `Err` counts the failures of this export.
    fn answer(self: Box<Self>, result: Result<(), (u64, &ExportError)>);
}

/// The flushes of one export. Clones share their state.
#[derive(Clone, Default)]
pub(crate) struct Flushes {
    state: Arc<Mutex<State>>,
    /// The time of the last successful FLUSH, in milliseconds since 1970; 0 if there was none.
    last_success: Arc<AtomicU64>,
}

#[derive(Default)]
struct State {
    waiting: Vec<Box<dyn Waiter>>,
    /// Number of durable changes that are not answered yet.
    changes: usize,
    /// The number of requests that the last flush has answered.
    last_group: usize,
    /// The start of the running flush.
    began: Option<Instant>,
    /// Whether a job that will serve the waiters is queued or running.
    is_scheduled: bool,
}

impl Flushes {
    /// Adds `waiter`, which a flush of `export` that begins after this call will answer.
    pub(crate) fn join(
        &self,
        scheduler: &Scheduler,
        group: GroupId,
        export: &Arc<dyn Export>,
        failures: &DurabilityFailures,
        waiter: Box<dyn Waiter>,
    ) {
        let mut state = self.state();
        state.waiting.push(waiter);
        if std::mem::replace(&mut state.is_scheduled, true) {
            return;
        }
        drop(state);
        let job = FlushJob {
            flushes: self.clone(),
            export: Arc::clone(export),
            failures: failures.clone(),
            is_done: false,
        };
        scheduler.submit_own(group, Box::new(job));
    }

    fn begin_flush(&self, waiters: usize) {
        let mut state = self.state();
        (state.began, state.last_group) = (Some(Instant::now()), waiters);
    }

    /// Records the success of a FLUSH.
    pub(crate) fn note_success(&self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        self.last_success.store(now, Ordering::Relaxed);
    }

    /// The time of the last successful FLUSH.
    pub(crate) fn last_success(&self) -> Option<SystemTime> {
        match self.last_success.load(Ordering::Relaxed) {
            0 => None,
            time => SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(time)),
        }
    }

    /// Counts a durable change until the returned value is dropped.
    pub(crate) fn begin_change(&self) -> UnderWay {
        self.state().changes += 1;
        UnderWay { flushes: self.clone() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A durable change that is not answered yet.
pub(crate) struct UnderWay {
    flushes: Flushes,
}

impl UnderWay {
    /// Whether a flush is likely to serve other requests as well. If a running one has much to
    /// write, a change should not wait for it.
    pub(crate) fn has_company(&self) -> bool {
        let state = self.flushes.state();
        let is_slow = state.began.is_some_and(|began| began.elapsed() > SLOW);
        !is_slow && (state.changes > 1 || state.last_group > 1)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.flushes.state().changes -= 1;
    }
}

/// Flushes while requests wait for it.
struct FlushJob {
    flushes: Flushes,
    export: Arc<dyn Export>,
    failures: DurabilityFailures,
    is_done: bool,
}

impl Job for FlushJob {
    fn cost(&self) -> Cost {
        Cost { class: Class::Wait, estimate: ESTIMATE }
    }

    fn step(mut self: Box<Self>, _: &Scheduler) -> Option<Box<dyn Job>> {
        // The flush begins here: later requests wait for the next one.
        let waiting = std::mem::take(&mut self.flushes.state().waiting);
        let (wanted, abandoned): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|waiter| !waiter.is_abandoned());
        // Dropping them may lock the state.
        drop(abandoned);
        if !wanted.is_empty() {
            self.flushes.begin_flush(wanted.len());
            self.flush_for(wanted);
        }
        let mut state = self.flushes.state();
        state.began = None;
        if state.waiting.is_empty() {
            state.is_scheduled = false;
            drop(state);
            self.is_done = true;
            return None;
        }
        drop(state);
        Some(self)
    }
}

impl FlushJob {
    fn flush_for(&self, waiting: Vec<Box<dyn Waiter>>) {
        let flushed = catch_unwind(AssertUnwindSafe(|| self.export.flush()));
        let result = flushed.unwrap_or_else(|_| {
            tracing::error!("a flush panicked");
            Err(ExportError::new(Errno::EIO, "the server failed"))
        });
        if result.is_ok() {
            self.flushes.note_success();
        }
        match result {
            // A durable change that is under way may have taken the error of this flush, and not
            // have counted it yet.
            Ok(()) => self.failures.after_syncs(move || {
                waiting.into_iter().for_each(|waiter| waiter.answer(Ok(())));
            }),
            // One failure, however many requests it answers.
            Err(error) => {
                let count = self.failures.add();
                waiting.into_iter().for_each(|waiter| waiter.answer(Err((count, &error))));
            }
        }
    }
}

impl Drop for FlushJob {
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        // It will never run: the server ends.
        let mut state = self.flushes.state();
        state.is_scheduled = false;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        drop(waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_deferred_waits_for_the_syncs_before_it_alone() {
        let failures = DurabilityFailures::default();
        let done = Arc::new(AtomicU64::new(0));
        let defer = || {
            let done = Arc::clone(&done);
            failures.after_syncs(move || _ = done.fetch_add(1, Ordering::SeqCst));
        };
        defer();
        assert_eq!(done.load(Ordering::SeqCst), 1, "there are none");
        let [first, second] = [failures.begin_sync(), failures.begin_sync()];
        defer();
        let third = failures.begin_sync();
        defer();
        drop(second);
        assert_eq!(done.load(Ordering::SeqCst), 1);
        drop(first);
        assert_eq!(done.load(Ordering::SeqCst), 2, "the third came later");
        drop(third);
        assert_eq!(done.load(Ordering::SeqCst), 3);
        assert!(failures.syncs.lock().unwrap().deferred.is_empty());
    }
}
